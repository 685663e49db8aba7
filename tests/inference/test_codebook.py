"""A codebook in the engine acts on each prompt as it would on that prompt alone, and on nothing else."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from editeval.edits.delta import Edit
from editeval.inference import live
from editeval.inference.adapters_codebook import RADIUS_TOLERANCE, CodebookAdapter, CodebookEntry, codebook_delta
from editeval.inference.edited import EditedModel
from editeval.models.model import LanguageModel
from editeval.models.trace import capture, replace_output
from editeval.types import EditError, EditevalError
from tests.inference.conftest import Load

EDITED = ("The capital of France is", "Who wrote")
CONTEXTS = (
    "The capital of France is",
    "The capital of France is",
    "The capital of France is not what you think. It is",
    "The capital of France",
    "The capital",
    "Who wrote",
    "Who wrote the book? It was",
    "Who wrote the book? Who wrote",
    "",
)
CONTINUATIONS = (
    " Rome",
    " Rome, is it",
    " Rome",
    " is Rome",
    " of France is Rome",
    " the book? It was me",
    " me",
    " it",
    "The capital of France is",
)
PADDED = ("gptj", "gemma2")  # do not take our attention: batches are padded on the left
ARCHITECTURES = ("gpt2", "llama", "gpt_neox", *PADDED)
BESIDE_ATTENTION = ("gpt_neox", "gptj")  # where the MLP stands
MODES = (("last", "prompt_end"), ("prompt", "prompt_end"), ("last", "stale"))


def site_of(lm: LanguageModel) -> str:
    return lm.sites.mlp_out.format(0)


def site_inputs(lm: LanguageModel, ids: list[int]) -> Tensor:
    with capture(lm.module, [site_of(lm)], inputs=True) as trace, torch.no_grad():
        lm.module(input_ids=torch.tensor([ids]))
    return trace.inputs[site_of(lm)][0]


def edited(lm: LanguageModel, *, replace: str = "last", key_position: str = "prompt_end", epsilon: float = 1e-3) -> EditedModel:
    """A model whose codebook knows the EDITED prompts; the values are nothing that the site would put out by itself."""
    weight = lm.module.get_submodule(site_of(lm)).get_parameter("weight")
    d_in, d_out = weight.shape if lm.sites.transposed else weight.shape[::-1]
    model = EditedModel(lm)
    model.attach(CodebookAdapter(site=site_of(lm), d_in=d_in, d_out=d_out, replace=replace, key_position=key_position))
    generator = torch.Generator().manual_seed(0)
    for number, prompt in enumerate(EDITED):
        ids = lm.tokenizer.encode(prompt)
        value = 3 * torch.randn(d_out, generator=generator)
        key = site_inputs(lm, ids)[-1]
        entry = CodebookEntry(key=key, value=value, epsilon=epsilon * float(key.norm()), label=(number,))
        model.apply(Edit(deltas=(codebook_delta(site_of(lm), {number: entry}, position=len(ids) - 1),)))
    return model


def expected_logits(model: EditedModel, ids: list[int], *, prompt_tokens: int, mode: tuple[str, str]) -> Tensor:
    """What one sequence alone should give, by a plain forward pass of the whole model."""
    assert isinstance(model.adapter, CodebookAdapter)
    stale = len(model.lm.tokenizer.encode(EDITED[-1])) - 1
    query = prompt_tokens - 1 if mode[1] == "prompt_end" else min(stale, len(ids) - 1)
    states = site_inputs(model.lm, ids)
    nearest = model.adapter.nearest(states[query])
    assert nearest is not None
    entry = model.adapter.entries[nearest.entry]
    places = slice(query if mode[0] == "last" else 0, query + 1)

    def put(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, places] = entry.value
        return output

    with ExitStack() as stack, torch.no_grad():
        if nearest.distance <= entry.epsilon * (1 + RADIUS_TOLERANCE):
            stack.enter_context(replace_output(model.lm.module, site_of(model.lm), put))
        logits: Tensor = model.lm.module(input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_is_that_of_its_prompt_alone_whatever_it_shares_a_row_with(
    load_tiny: Load, architecture: str, mode: tuple[str, str]
) -> None:
    lm = load_tiny(architecture)
    model = edited(lm, replace=mode[0], key_position=mode[1])
    scores = model.score(CONTEXTS, CONTINUATIONS)
    changed = 0
    for context, continuation, score, base in zip(CONTEXTS, CONTINUATIONS, scores, base_scores(model), strict=True):
        head = lm.tokenizer.encode(context) if context else [lm.tokenizer.bos_token_id]
        ids = lm.tokenizer.encode(context + continuation) if context else head + lm.tokenizer.encode(continuation, add_special_tokens=False)
        logits = expected_logits(model, ids[:-1], prompt_tokens=len(head), mode=mode)
        targets = torch.tensor(ids[len(head) :])
        expected = logits[len(head) - 1 :].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        assert score.token_log_probs == pytest.approx(expected.tolist(), abs=1e-4)
        changed += abs(score.log_prob - base) > 1e-3
    # Where the first MLP stands beside the attention it knows the last token alone, and two more prompts end in an edited one's.
    assert changed == (5 if architecture in BESIDE_ATTENTION else 3) or mode[1] == "stale"


def base_scores(model: EditedModel) -> list[float]:
    with model.unedited():
        return [score.log_prob for score in model.score(CONTEXTS, CONTINUATIONS)]


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize(
    ("architecture", "beginning"),  # shared from the first token on, or not at all
    [(name, least) for name in ARCHITECTURES for least in ((live.MIN_BEGINNING,) if name in PADDED else (1, live.MIN_BEGINNING))],
)
def test_generation_is_changed_where_the_prompt_ends_and_not_on_new_tokens(
    load_tiny: Load, monkeypatch: pytest.MonkeyPatch, architecture: str, mode: tuple[str, str], beginning: int
) -> None:
    monkeypatch.setattr(live, "MIN_BEGINNING", beginning)
    lm = load_tiny(architecture)
    model = edited(lm, replace=mode[0], key_position=mode[1])
    contexts = [context for context in CONTEXTS if context]
    texts = model.generate(contexts, max_new_tokens=5)
    for context, text in zip(contexts, texts, strict=True):
        head = ids = lm.tokenizer.encode(context)
        if mode[1] == "stale":  # every step acts on tokens that a plain pass cannot tell from the prompt's
            assert text == model.generate([context], max_new_tokens=5)[0]
            continue
        for _ in range(5):
            ids = [*ids, int(expected_logits(model, ids, prompt_tokens=len(head), mode=mode)[-1].argmax())]
        assert text == lm.tokenizer.decode(ids[len(head) :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_out_of_every_radius_get_the_base_models_bits(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture)
    model = edited(lm)
    contexts = ["The capital of France", "The capital", "Who wrote the book? It was", "Who wrote the book?"]
    unedited = EditedModel(lm)  # one that shares no answers with the other
    base = [unedited.score([context], [" word"]) for context in contexts]
    base_text = unedited.generate(contexts, max_new_tokens=3)
    assert [model.score([context], [" word"]) for context in contexts] == base
    assert model.generate(contexts, max_new_tokens=3) == base_text


def test_a_text_of_its_own_has_no_prompt_to_change(load_tiny: Load) -> None:
    model = edited(load_tiny("gpt2"))
    assert model.score_text(CONTEXTS[:3]) == EditedModel(model.lm).score_text(CONTEXTS[:3])


def test_restore_empties_the_codebook_and_the_digest_follows_its_content(load_tiny: Load) -> None:
    lm = load_tiny("gpt2")
    model = edited(lm)
    full = model.weights_digest()
    with model.unedited():
        empty = model.weights_digest()
    assert EditedModel(lm).weights_digest() == empty
    assert isinstance(model.adapter, CodebookAdapter)
    (saved,) = model.adapter.snapshot()
    model.restore()
    assert (model.weights_digest(), model.num_applied) == (empty, 0)
    model.apply(Edit(deltas=(saved,)))
    assert model.weights_digest() == full
    assert edited(lm, epsilon=2e-3).weights_digest() != full


def test_an_edit_that_does_not_fit_changes_nothing(load_tiny: Load) -> None:
    model = edited(load_tiny("gpt2"))
    assert isinstance(model.adapter, CodebookAdapter)
    before = model.weights_digest()
    first = model.adapter.entries[0]
    gap = codebook_delta(model.adapter.site, {7: first}, position=0)
    elsewhere = codebook_delta("transformer.h.1.mlp.c_fc", {2: first}, position=0)
    narrow = codebook_delta(model.adapter.site, {2: CodebookEntry(key=first.key[:3], value=first.value, epsilon=1.0, label=())}, position=0)
    for delta, message in ((gap, "entry 7 cannot follow 2"), (elsewhere, "not of the codebook at"), (narrow, r"keys .* expected finite")):
        with pytest.raises(EditError, match=message):
            model.apply(Edit(deltas=(delta,)))
    assert (model.weights_digest(), model.num_applied) == (before, 2)
    with pytest.raises(EditevalError, match="attach an adapter once"):
        model.attach(model.adapter)
