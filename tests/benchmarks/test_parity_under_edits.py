"""Our engine under edits against the harness's own, whose hook and routing `benchmarks/under_edits.py` writes apart from our adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig

from benchmarks.eval_parity import METHODS, compare_facts
from benchmarks.under_edits import Edited, edited, reference_engine
from editeval.edits.delta import CodebookDelta, Edit
from editeval.experiment import assemble


def tiny_edited(compose_config: Callable[..., DictConfig], method: str) -> Edited:
    # The random model's hidden states are near to each other, and so are hashed texts: the edits act on some requests and not on others.
    config = compose_config("debug=tiny", "model=tiny-llama", f"method={method}", "callback=silent", "logger=[]")
    return edited(method, assemble(config), 3)


@pytest.mark.parametrize("method", METHODS)
def test_answers_about_edited_facts_equal_those_of_the_harness(compose_config: Callable[..., DictConfig], method: str) -> None:
    state = tiny_edited(compose_config, method)
    parity = compare_facts(state, reference_engine(state.model, state.edits))
    assert parity.same, parity
    assert parity.texts == parity.texts_equal > 0
    if parity.requests_acted_on is not None:
        assert 0 < parity.requests_acted_on < parity.items


def test_another_value_in_the_codebook_is_told_apart(compose_config: Callable[..., DictConfig]) -> None:
    state = tiny_edited(compose_config, "grace")
    wrong = []
    for edit in state.edits:
        (delta,) = edit.deltas
        assert isinstance(delta, CodebookDelta)
        wrong.append(Edit(deltas=(dataclasses.replace(delta, values=torch.zeros_like(delta.values)),)))
    assert not compare_facts(state, reference_engine(state.model, wrong)).same
