"""A device whose memory is too small for a pass: the engine goes on with smaller ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from editeval.inference.edited import EditedModel
from tests.inference.conftest import Load, Questions


def limit_memory(model: EditedModel, monkeypatch: pytest.MonkeyPatch, *, tokens: int) -> list[int]:
    """Let every pass of more tokens run out of memory; return the list that will hold the sizes of those that did not."""
    sizes: list[int] = []
    plain_forward = type(model.lm.module).forward

    @functools.wraps(plain_forward)  # the engine reads the signature
    def forward(self: Any, **options: Any) -> Any:
        if options["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("no memory left")
        sizes.append(options["input_ids"].numel())
        return plain_forward(self, **options)

    monkeypatch.setattr(type(model.lm.module), "forward", forward)
    return sizes


@pytest.mark.parametrize("architecture", ["llama", "gptj"])  # with our attention, and with its own
def test_pass_that_does_not_fit_is_halved_until_it_does(
    load_tiny: Load, questions: Questions, architecture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = load_tiny(architecture)
    scores = [score.log_prob for score in EditedModel(lm).score(*questions)]
    texts = EditedModel(lm).generate(questions[0][:6], max_new_tokens=5)
    model = EditedModel(lm)
    sizes = limit_memory(model, monkeypatch, tokens=200)
    assert [score.log_prob for score in model.score(*questions)] == pytest.approx(scores, abs=1e-4)
    assert model.generate(questions[0][:6], max_new_tokens=5) == texts
    assert max(sizes) <= 200
    assert "out of memory" in caplog.text
    caplog.clear()
    model.score(*questions)  # remembered: nothing runs out of memory again
    assert "out of memory" not in caplog.text


def test_model_that_has_no_room_for_one_row_says_so(load_tiny: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditedModel(load_tiny("llama"))
    limit_memory(model, monkeypatch, tokens=10)
    with pytest.raises(torch.OutOfMemoryError):
        model.score(["a context of many more tokens than ten, to be sure"], [" end"])
