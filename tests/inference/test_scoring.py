from __future__ import annotations

import logging
import math
import random
from typing import Any

import pytest
import torch

from editeval.edits.delta import DenseDelta, Edit
from editeval.inference.edited import EditedModel
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.types import EditevalError
from tests.inference.conftest import Load, Questions, cast_parameters


def plain_scores(lm: LanguageModel, text_ids: list[int], num_scored: int) -> tuple[list[float], list[bool]]:
    """The log-probabilities and greedy flags of a sequence's last tokens by one plain forward pass."""
    with torch.no_grad():
        log_probs = lm.module(input_ids=torch.tensor([text_ids[:-1]])).logits[0].float().log_softmax(-1)[-num_scored:]
    targets = torch.tensor(text_ids[-num_scored:])
    return log_probs.gather(-1, targets[:, None])[:, 0].tolist(), (log_probs.argmax(-1) == targets).tolist()


@pytest.mark.parametrize("architecture", SITES)
def test_score_equals_a_plain_forward_pass_of_each_pair(load_tiny: Load, questions: Questions, architecture: str) -> None:
    lm = load_tiny(architecture)
    scores = EditedModel(lm, batch_tokens=400).score(*questions)
    for context, continuation, score in zip(*questions, scores, strict=True):
        kept = context.rstrip()
        whole = lm.tokenizer.encode(context + continuation, add_special_tokens=bool(kept))
        if not kept:
            whole = [lm.tokenizer.bos_token_id, *whole]
        num_context = len(lm.tokenizer.encode(kept)) if kept else 1
        log_probs, is_greedy = plain_scores(lm, whole, len(whole) - num_context)
        assert score.token_log_probs == pytest.approx(log_probs, abs=1e-4)
        assert score.token_is_greedy == tuple(is_greedy)
        assert score.log_prob == pytest.approx(sum(log_probs), abs=1e-4)


@pytest.mark.parametrize("architecture", SITES)
def test_score_is_independent_of_batch_size_order_and_neighbours(load_tiny: Load, questions: Questions, architecture: str) -> None:
    lm = load_tiny(architecture)
    expected = [EditedModel(lm, batch_tokens=1).score([context], [end])[0].log_prob for context, end in zip(*questions, strict=True)]
    order = random.Random(0).sample(range(len(expected)), len(expected))
    for batch_tokens in (64, 4096):
        shuffled = EditedModel(lm, batch_tokens=batch_tokens).score([questions[0][i] for i in order], [questions[1][i] for i in order])
        assert [score.log_prob for score in shuffled] == pytest.approx([expected[i] for i in order], abs=1e-4)


@pytest.mark.parametrize("architecture", SITES)
def test_every_architecture_takes_trees_as_deep_as_its_window(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture)
    window = getattr(lm.module.config, "sliding_window", None) or lm.description.max_positions
    plan = EditedModel(lm)._engine.plan()
    assert plan.rules.branch_depth == window


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_context_longer_than_the_sliding_window_is_scored_as_the_model_does(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture, sliding_window=8)
    contexts, ends = ["one two three four five six seven eight nine ten"] * 3, [" eleven twelve", " eleven", " to the end of all things"]
    for context, end, score in zip(contexts, ends, EditedModel(lm).score(contexts, ends), strict=True):
        whole = lm.tokenizer.encode(context + end)
        assert score.token_log_probs == pytest.approx(plain_scores(lm, whole, score.num_tokens)[0], abs=1e-4)


def test_a_window_is_told_of_once(load_tiny: Load, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="editeval")
    for architecture in ("mistral", "gpt2"):
        model = EditedModel(load_tiny(architecture))
        for _ in range(2):
            model.score(["one two"], [" three"])
    assert [record.message for record in caplog.records] == [
        "mistral has layers that see 64 tokens back: longer sequences share nothing and run as the model has it"
    ]


def test_model_that_ignores_tree_masks_is_run_in_chains(load_tiny: Load, questions: Questions, monkeypatch: Any) -> None:
    lm = load_tiny("gpt2")
    expected = [score.log_prob for score in EditedModel(lm).score(*questions)]
    plain_forward = type(lm.module).forward

    def forward(self: Any, *, input_ids: Any, position_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        return plain_forward(self, input_ids=input_ids, **options)  # neither mask nor positions arrive

    monkeypatch.setattr(type(lm.module), "forward", forward)
    model = EditedModel(lm)
    assert [score.log_prob for score in model.score(*questions)] == pytest.approx(expected, abs=1e-4)
    assert model._engine.plan().rules.branch_depth == 0


def test_half_precision_scores_are_finite_and_near_those_of_full_precision(load_tiny: Load, questions: Questions) -> None:
    lm = load_tiny("llama")
    full = [score.log_prob for score in EditedModel(lm).score(*questions)]
    cast_parameters(lm, torch.bfloat16)
    half = [score.log_prob for score in EditedModel(lm).score(*questions)]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_context_that_is_too_long_is_cut_on_the_left(load_tiny: Load) -> None:
    lm = load_tiny("gpt2", max_positions=32)
    context = "town " * 60 + "and the river"
    (score,) = EditedModel(lm).score([context], [" runs"])
    whole = lm.tokenizer.encode(context + " runs")[-33:]
    assert score.token_log_probs == pytest.approx(plain_scores(lm, whole, score.num_tokens)[0], abs=1e-4)


def test_text_is_scored_token_by_token_across_windows(load_tiny: Load) -> None:
    lm = load_tiny("gpt2", max_positions=32)
    texts = ["the town and the river " * 12, "short", ""]
    scores = EditedModel(lm).score_text(texts)
    tokens = lm.tokenizer.encode(texts[0])
    assert [score.num_tokens for score in scores] == [len(tokens), len(lm.tokenizer.encode("short")), 0]
    first = plain_scores(lm, [lm.tokenizer.bos_token_id, *tokens[:32]], 32)[0]
    last = plain_scores(lm, tokens[-33:], len(tokens) % 32)[0]
    assert scores[0].token_log_probs[:32] == pytest.approx(first, abs=1e-4)
    assert scores[0].token_log_probs[-len(last) :] == pytest.approx(last, abs=1e-4)
    assert scores[0].log_prob == pytest.approx(math.fsum(scores[0].token_log_probs), abs=1e-9)
    assert scores[2].log_prob == 0.0


def test_generators_weights_and_tokenizer_are_left_as_found(load_tiny: Load, questions: Questions) -> None:
    lm = load_tiny("llama")
    before = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_num_threads(),
        lm.tokenizer.padding_side,
        lm.tokenizer.backend_tokenizer.to_str(),
    )
    weights = {name: parameter.clone() for name, parameter in lm.module.named_parameters()}
    model = EditedModel(lm)
    model.score(*questions)
    model.score_text(questions[0])
    model.generate(questions[0], max_new_tokens=3, stop=["."])
    after = (
        torch.get_rng_state(),
        random.getstate(),
        torch.get_num_threads(),
        lm.tokenizer.padding_side,
        lm.tokenizer.backend_tokenizer.to_str(),
    )
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in lm.module.named_parameters())


def test_model_in_training_mode_is_refused(load_tiny: Load) -> None:
    lm = load_tiny("gpt2")
    lm.module.train()
    with pytest.raises(EditevalError, match="training mode"):
        EditedModel(lm).score(["a"], [" b"])


class _Request:
    """What HFLM reads of a request."""

    task_name = "parity"

    def __init__(self, *args: str) -> None:
        self.args = args


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def beside_lm_eval(request: Any, load_tiny: Load) -> tuple[EditedModel, Any]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own
        from lm_eval.models.huggingface import HFLM

        reference = load_tiny(request.param)
        return EditedModel(load_tiny(request.param)), HFLM(pretrained=reference.module, tokenizer=reference.tokenizer, batch_size=1)


def test_score_equals_lm_eval(beside_lm_eval: tuple[EditedModel, Any], questions: Questions) -> None:
    model, reference = beside_lm_eval
    # lm-eval has no answer where the context is white space alone.
    pairs = [(context, end) for context, end in zip(*questions, strict=True) if context.strip() or not context]
    expected = reference.loglikelihood([_Request(*pair) for pair in pairs], disable_tqdm=True)
    scores = model.score([context for context, _ in pairs], [end for _, end in pairs])
    assert [score.log_prob for score in scores] == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-3)
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in expected]


def test_text_score_equals_lm_eval(beside_lm_eval: tuple[EditedModel, Any]) -> None:
    model, reference = beside_lm_eval
    texts = ["the town and the river " * 40, "a short text"]
    expected = reference.loglikelihood_rolling([_Request(text) for text in texts], disable_tqdm=True)
    assert [score.log_prob for score in model.score_text(texts)] == pytest.approx(expected, abs=1e-3)


def test_generation_equals_lm_eval(beside_lm_eval: tuple[EditedModel, Any], questions: Questions) -> None:
    model, reference = beside_lm_eval
    contexts = [context for context in dict.fromkeys(questions[0]) if context.strip()]
    arguments = {"until": ["th", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    expected = reference.generate_until([_Request(context, arguments) for context in contexts], disable_tqdm=True)  # type: ignore[arg-type]
    assert model.generate(contexts, max_new_tokens=24, stop=["th", "\n\n"]) == expected


def test_collapsed_model_is_still_answered(load_tiny: Load, questions: Questions) -> None:
    model = EditedModel(load_tiny("gpt2"))
    name = model.lm.sites.mlp_out.format(0) + ".weight"
    model.apply(Edit(deltas=(DenseDelta(parameter=name, value=torch.full(model.weight(name).shape, 1e38)),)))
    scores = model.score(*questions)
    assert all(math.isnan(score.log_prob) for score in scores)
    assert len(model.generate(questions[0], max_new_tokens=4)) == len(questions[0])


IN_PIECES = tuple(name for name in SITES if name not in {"gptj", "gemma2"})  # own attention code; capped scores


@pytest.mark.parametrize("architecture", SITES)
def test_attention_in_pieces_is_used_where_the_model_takes_it_and_only_there(load_tiny: Load, architecture: str) -> None:
    assert EditedModel(load_tiny(architecture))._engine.plan().in_pieces == (architecture in IN_PIECES)


@pytest.mark.parametrize("architecture", IN_PIECES)
def test_rows_longer_than_the_model_score_as_their_sequences_do(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture, max_positions=64)
    contexts = [f"{'a town at the sea and a river. ' * 4}Question {number}: {'why ' * (number % 9)}?" for number in range(40)]
    model = EditedModel(lm)
    scores = model.score(contexts, [" because"] * len(contexts))
    assert model._engine.plan().rules.row_tokens > 64
    for context, score in zip(contexts, scores, strict=True):
        whole = lm.tokenizer.encode(context + " because")[-65:]
        assert score.token_log_probs == pytest.approx(plain_scores(lm, whole, score.num_tokens)[0], abs=1e-4)
