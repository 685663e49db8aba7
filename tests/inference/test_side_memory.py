"""Side memories: who is sent where, what acts on an answer, and how full memories become one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editeval.edits.delta import Edit, SideMemoryDelta
from editeval.inference.adapters_side_memory import ALL, SideMemory, SideMemoryAdapter, SideMemoryRules, merged, ties
from editeval.inference.edited import EditedModel
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.models.trace import capture
from editeval.types import EditError

RULES = SideMemoryRules(threshold=0.9, mask_share=0.3, mask_seed=0, shard_edits=2, merge_shards=2, density=0.5)
PROMPT = "The mother tongue of Danielle Darrieux is"
OTHER = "Nokia was founded in the city of"


@pytest.fixture(scope="module")
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="gpt2", cache_dir=cache_dir).load()


@pytest.fixture
def adapter(lm: LanguageModel) -> SideMemoryAdapter:
    width, inner = lm.description.hidden_size, lm.description.intermediate_size
    return SideMemoryAdapter(site=lm.sites.mlp_out.format(1), d_in=inner, d_out=width, rules=RULES)


@pytest.fixture
def model(lm: LanguageModel, adapter: SideMemoryAdapter) -> Iterator[EditedModel]:
    model = EditedModel(lm)
    model.attach(adapter)
    yield model
    model.restore()


def site_inputs(lm: LanguageModel, adapter: SideMemoryAdapter, prompt: str) -> Tensor:
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    with torch.no_grad(), capture(lm.module, [adapter.site], inputs=True) as trace:
        lm.module(input_ids=ids)
    return trace.inputs[adapter.site][0]


def noise(adapter: SideMemoryAdapter, lm: LanguageModel, *, seed: int, scale: float = 0.5) -> Tensor:
    shape = (lm.description.hidden_size, lm.description.intermediate_size)
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(model: EditedModel, *memories: SideMemory) -> None:
    adapter = model.adapter
    assert isinstance(adapter, SideMemoryAdapter)
    model.apply(Edit(deltas=tuple(adapter.delta(number, memory) for number, memory in enumerate(memories, len(adapter.memories)))))


def memory(difference: Tensor, *, activation: float, edits: int = 1) -> SideMemory:
    return SideMemory(difference=difference, mask=ALL, activation=activation, edits=edits)


def test_a_prompt_that_moves_no_memory_enough_is_answered_bit_for_bit_as_before(
    model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter
) -> None:
    before, text = model.score([PROMPT, OTHER], [" a b", " c"]), model.generate([PROMPT], max_new_tokens=5)
    write(model, memory(noise(adapter, lm, seed=0), activation=1e9))
    assert model.score([PROMPT, OTHER], [" a b", " c"]) == before
    assert model.generate([PROMPT], max_new_tokens=5) == text


def test_a_prompt_above_the_threshold_is_answered_by_the_copy(model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter) -> None:
    """On the tokens of its answer too, scored or written: all is that of a model with the copy as its weight."""
    difference, prompts = noise(adapter, lm, seed=0), [PROMPT, OTHER, "Yes"]
    unedited = model.generate(prompts, max_new_tokens=6)
    write(model, memory(difference, activation=0.0))
    sent, written = model.score(prompts, [" one two three"] * 3), model.generate(prompts, max_new_tokens=6)
    weight = lm.module.get_submodule(adapter.site).get_parameter("weight")
    assert lm.sites.transposed
    with torch.no_grad():
        weight += difference.T
        copied, copy_written = EditedModel(lm).score(prompts, [" one two three"] * 3), EditedModel(lm).generate(prompts, max_new_tokens=6)
        weight -= difference.T
    for ours, theirs in zip(sent, copied, strict=True):
        assert ours.token_log_probs == pytest.approx(theirs.token_log_probs, abs=1e-3)
    assert written == copy_written != unedited


def test_the_same_tokens_decide_whether_an_answer_is_written_or_scored(
    model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, sizes = f"{PROMPT}\n", []
    choose = adapter.choose
    monkeypatch.setattr(adapter, "choose", lambda inputs: (sizes.append(len(inputs)), choose(inputs))[1])
    write(model, memory(noise(adapter, lm, seed=0), activation=0.0))
    model.generate([prompt], max_new_tokens=2)
    model.score([prompt], ["the"])
    model.score_answers([prompt], ["the"])
    assert sizes == [len(lm.tokenizer(prompt)["input_ids"])] * 3


def test_each_window_of_a_text_is_routed_by_all_of_its_tokens(
    model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is a prompt without an answer, so that the copy acts on all of a window or on nothing of it."""
    size, texts = lm.description.max_positions, [f"{PROMPT} French", "word " * (lm.description.max_positions * 2 // 5), OTHER]
    tokens = [len(lm.tokenizer(text)["input_ids"]) for text in texts]
    assert size < tokens[1] < 2 * size
    before, sizes, difference = model.score_text(texts), list[int](), noise(adapter, lm, seed=0)
    write(model, memory(difference, activation=0.0))
    choose = adapter.choose
    monkeypatch.setattr(adapter, "choose", lambda inputs: (sizes.append(len(inputs)), choose(inputs))[1])
    sent = model.score_text(texts)
    # A window's last token is not given to the model, and one token stands before its first.
    assert sorted(sizes) == sorted([tokens[0], size, size, tokens[2]])
    weight = lm.module.get_submodule(adapter.site).get_parameter("weight")
    with torch.no_grad():
        weight += difference.T
        copied = EditedModel(lm).score_text(texts)
        weight -= difference.T
    for ours, theirs, unedited in zip(sent, copied, before, strict=True):
        assert ours.token_log_probs == pytest.approx(theirs.token_log_probs, abs=1e-3)
        assert ours.token_log_probs != pytest.approx(unedited.token_log_probs, abs=1e-3)
    with model.unedited():
        assert model.score_text(texts) == before
    model.restore()
    write(model, memory(difference, activation=1e9))
    for ours, unedited in zip(model.score_text(texts), before, strict=True):
        assert ours.token_log_probs == pytest.approx(unedited.token_log_probs, abs=1e-5)
    assert model.score_text(texts[:1]) == EditedModel(lm).score_text(texts[:1])


def test_the_threshold_is_the_share_of_the_smallest_activation(lm: LanguageModel, adapter: SideMemoryAdapter, model: EditedModel) -> None:
    inputs = site_inputs(lm, adapter, PROMPT)
    difference = noise(adapter, lm, seed=0)
    activation = float((inputs @ difference.T).norm(dim=1).mean())
    write(model, memory(difference, activation=activation / 0.9 * 1.01))
    assert adapter.choose(inputs) == -1
    model.restore()
    write(model, memory(difference, activation=activation / 0.9 * 0.99))
    assert adapter.choose(inputs) == 0


def test_of_memories_in_scope_the_most_active_one_acts(lm: LanguageModel, adapter: SideMemoryAdapter, model: EditedModel) -> None:
    strong, weak = noise(adapter, lm, seed=0, scale=0.9), noise(adapter, lm, seed=1, scale=0.1)
    write(model, memory(weak, activation=0.0), memory(strong, activation=0.0))
    assert adapter.choose(site_inputs(lm, adapter, PROMPT)) == 1
    model.restore()
    write(model, memory(weak, activation=0.0), memory(strong, activation=1e9))
    assert adapter.choose(site_inputs(lm, adapter, PROMPT)) == 0


def test_a_mask_is_the_same_for_the_same_number_and_holds_its_share(adapter: SideMemoryAdapter) -> None:
    first, other, again = (adapter.mask(number).clone() for number in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.float().mean()) == pytest.approx(0.3, abs=0.02)


def test_only_what_the_mask_holds_is_recorded_and_comes_back(model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter) -> None:
    difference = torch.where(adapter.mask(5), noise(adapter, lm, seed=0), 0.0)
    delta = adapter.delta(0, SideMemory(difference=difference, mask=5, activation=1.0, edits=1))
    assert delta.values.shape == (int(adapter.mask(5).sum()),)
    model.apply(Edit(deltas=(delta,)))
    assert torch.equal(adapter.memories[0].difference, difference)


def test_ties_keeps_the_largest_elects_signs_and_averages_what_agrees() -> None:
    one = torch.tensor([4.0, -3.0, 0.1, 2.0, 0.0, 0.0])
    two = torch.tensor([2.0, 5.0, 0.2, 0.0, 0.0, -6.0])
    assert ties([one, two], density=0.5).tolist() == [3.0, 5.0, 0.0, 2.0, 0.0, -6.0]


def test_full_memories_become_one_and_a_merged_one_is_not_merged_again(lm: LanguageModel, adapter: SideMemoryAdapter) -> None:
    full = [
        SideMemory(difference=noise(adapter, lm, seed=seed), mask=seed, activation=1.0 + seed, edits=RULES.shard_edits) for seed in range(4)
    ]
    assert len(merged([full[0], replace(full[1], edits=1)], RULES)) == 2
    (one,) = merged(full[:2], RULES)
    assert torch.equal(one.difference, ties([full[0].difference, full[1].difference], density=RULES.density))
    assert (one.mask, one.activation, one.edits) == (ALL, 1.0, 4)
    assert len(merged([one, full[2]], RULES)) == 2
    assert [memory.edits for memory in merged([one, *full[2:]], RULES)] == [4, 4]


def test_edits_fill_memories_each_with_its_mask_and_a_snapshot_brings_all_back(
    model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter
) -> None:
    numbers = []
    for seed in range(5):
        number, memory = adapter.current()
        numbers.append((number, memory.mask, memory.edits))
        more = torch.where(adapter.mask(memory.mask), noise(adapter, lm, seed=seed), 0.0)
        grown = replace(memory, difference=memory.difference + more, activation=1.0, edits=memory.edits + 1)
        model.apply(Edit(deltas=(adapter.delta(number, grown),)))
    # After four edits, two full memories have become one; the fifth begins a new one with a mask of its own.
    assert numbers == [(0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (1, 2, 0)]
    digest, kept = adapter.digest(), adapter.snapshot()
    model.restore()
    assert adapter.is_empty
    adapter.add(kept)
    assert adapter.digest() == digest


@pytest.mark.parametrize("fault", ["site", "memory", "values", "nothing"])
def test_a_delta_that_does_not_fit_is_refused_and_changes_nothing(
    model: EditedModel, lm: LanguageModel, adapter: SideMemoryAdapter, fault: str
) -> None:
    write(model, memory(noise(adapter, lm, seed=0), activation=1.0))
    good = adapter.delta(0, memory(noise(adapter, lm, seed=1), activation=1.0))
    faulty: dict[str, SideMemoryDelta] = {
        "site": replace(good, site="elsewhere"),
        "memory": replace(good, memory=torch.tensor(3)),
        "values": replace(good, values=good.values[:-1]),
        "nothing": adapter.snapshot()[0],
    }
    digest = model.weights_digest()
    with pytest.raises(EditError):
        model.apply(Edit(deltas=(faulty[fault],)))
    assert model.weights_digest() == digest
