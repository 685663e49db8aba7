"""What is remembered between rungs costs no second pass, and never shows: answers are those of a model that remembers nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editeval.edits.delta import DenseDelta, Edit
from editeval.inference import encoding, engine
from editeval.inference.edited import EditedModel
from editeval.inference.recall import Remembered
from editeval.models.model import LanguageModel
from tests.inference.conftest import Load, Questions
from tests.inference.test_codebook import CONTEXTS, CONTINUATIONS, edited

UNRELATED = ["A road leads to", "Water is made of", "A road leads to the sea. It is"]
ENDS = [" town", " rain", " far"]


@contextmanager
def counted_passes(lm: LanguageModel) -> Iterator[list[int]]:
    """The tokens of every pass through the model within the context."""
    passes: list[int] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        passes.append(options["input_ids"].numel())

    handle = lm.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def test_requests_that_come_again_are_neither_tokenised_nor_packed_again(
    load_tiny: Load, questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EditedModel(load_tiny("llama"))
    before = model.score(*questions), model.score_text(UNRELATED), model.generate(UNRELATED, max_new_tokens=4)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("done twice")

    monkeypatch.setattr(encoding, "_encode", never)
    monkeypatch.setattr(engine, "pack_pairs", never)
    assert (model.score(*questions), model.score_text(UNRELATED), model.generate(UNRELATED, max_new_tokens=4)) == before


def test_what_is_remembered_of_requests_does_not_outlive_an_edit_of_the_weights(load_tiny: Load, questions: Questions) -> None:
    lm, other = load_tiny("llama"), load_tiny("llama")
    parameter = f"{lm.sites.mlp_out.format(0)}.weight"
    shape = lm.module.get_parameter(parameter).shape
    edit = Edit(deltas=(DenseDelta(parameter=parameter, value=torch.randn(shape, generator=torch.Generator().manual_seed(0))),))
    remembering, fresh = EditedModel(lm), EditedModel(other)
    unedited = remembering.score(*questions)
    for model in (remembering, fresh):
        model.apply(edit)
    assert remembering.score(*questions) == fresh.score(*questions) != unedited
    with remembering.unedited():
        assert remembering.score(*questions) == unedited


def test_requests_that_no_codebook_entry_reaches_cost_one_pass_however_many_edits_come(load_tiny: Load) -> None:
    model = edited(load_tiny("llama"))
    with model.unedited():
        base = model.score(UNRELATED, ENDS), model.generate(UNRELATED, max_new_tokens=3), model.score_text(UNRELATED)
    with counted_passes(model.lm) as passes:
        again = model.score(UNRELATED, ENDS), model.generate(UNRELATED, max_new_tokens=3), model.score_text(UNRELATED)
    assert again == base
    assert passes == []


def test_a_call_with_one_request_that_is_reached_is_answered_as_if_nothing_were_remembered(load_tiny: Load) -> None:
    remembering, fresh = edited(load_tiny("llama")), edited(load_tiny("llama"))
    with remembering.unedited():
        base = remembering.score(CONTEXTS, CONTINUATIONS)
        remembering.generate(CONTEXTS, max_new_tokens=3)
    found = remembering.score(CONTEXTS, CONTINUATIONS)
    assert found == fresh.score(CONTEXTS, CONTINUATIONS) != base
    assert remembering.generate(CONTEXTS, max_new_tokens=3) == fresh.generate(CONTEXTS, max_new_tokens=3)
    remembering.restore()
    assert remembering.score(CONTEXTS, CONTINUATIONS) == base


def test_a_model_that_was_resumed_answers_bit_for_bit_as_one_that_remembers(load_tiny: Load) -> None:
    remembering, resumed = edited(load_tiny("llama")), edited(load_tiny("llama"))
    with remembering.unedited():
        remembering.score([*UNRELATED, *CONTEXTS], [*ENDS, *CONTINUATIONS])
    for contexts, ends in ((UNRELATED, ENDS), (list(CONTEXTS), list(CONTINUATIONS)), ([*UNRELATED, *CONTEXTS], [*ENDS, *CONTINUATIONS])):
        first = remembering.score(contexts, ends)
        assert first == remembering.score(contexts, ends) == resumed.score(contexts, ends)


@pytest.mark.parametrize("mode", [("last", "stale"), ("prompt", "prompt_end")], ids="-".join)
def test_queries_that_move_with_the_edits_are_taken_anew(load_tiny: Load, mode: tuple[str, str]) -> None:
    model = edited(load_tiny("llama"), replace=mode[0], key_position=mode[1])
    fresh = edited(load_tiny("llama"), replace=mode[0], key_position=mode[1])
    with model.unedited():
        model.score(CONTEXTS, CONTINUATIONS)
    assert model.score(CONTEXTS, CONTINUATIONS) == fresh.score(CONTEXTS, CONTINUATIONS)


@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
def test_a_store_keeps_its_budget_and_what_was_put_last(sizes: list[tuple[int, int]]) -> None:
    store: Remembered[tuple[int, int]] = Remembered(lambda value: value[1], budget=10)
    kept: dict[int, tuple[int, int]] = {}
    for key, size in sizes:
        assert store.put(key, (key, size)) == (key, size)
        kept[key] = (key, size)
        assert store.get(key) == ((key, size) if size <= 10 else None)
        held = [store.get(known) for known in kept]
        assert sum(value[1] for value in held if value is not None) <= 10
        assert all(value is None or value[0] == known for known, value in zip(kept, held, strict=True))


def test_a_larger_value_that_replaces_one_is_not_mixed_up_with_it() -> None:
    store: Remembered[str] = Remembered(len, budget=4)
    store.put("a", "xx")
    store.put("a", "xxxxx")  # does not fit: what is no longer true is not kept either
    assert store.get("a") is None
