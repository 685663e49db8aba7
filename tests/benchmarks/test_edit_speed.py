"""What `benchmarks/edit_speed.py` compares gives the same outcome in both forms; seconds are no matter of tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import edit_speed
from benchmarks.edit_speed import METHODS, main
from benchmarks.speed_pairs import Compute, Outcome, Pair
from benchmarks.speed_setup import Setup
from editeval.edits.delta import LowRankDelta
from editeval.files import append_jsonl, read_jsonl
from editeval.types import EditRequest

TINY = ("--models", "tiny", "--edits", "1")


def told(capsys: pytest.CaptureFixture[str]) -> Mapping[str, Any]:
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


@pytest.mark.parametrize("method", METHODS)
def test_both_forms_of_a_method_give_the_same_outcome(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--methods", method]) == 0
    record = told(capsys)
    (timing,) = record["timings"]
    assert record["same"]
    assert (timing["method"], timing["facts"]) == (method, 1)
    # On a model as narrow as this one, rounding is all that differs, whatever a method's tolerance on wide ones.
    assert timing["largest_difference"] < 1e-4
    assert (timing["plain_passes_an_edit"] is not None) == (method == "mend")


def test_an_outcome_that_differs_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(setup: Setup) -> Pair:
        pair = METHODS["mend"](setup)

        def ours(request: EditRequest) -> Outcome:
            found = dict(pair.ours(request))
            name, update = next(iter(found.items()))
            assert isinstance(update, LowRankDelta)
            return {**found, name: replace(update, left=1.01 * update.left)}

        return replace(pair, ours=ours)

    monkeypatch.setattr(edit_speed, "METHODS", {"wrong": wrong})
    assert main([*TINY, "--methods", "wrong"]) == 1
    assert not told(capsys)["same"]


def rounded(of_ours: float, of_plain: float) -> Callable[[Setup], Pair]:
    """ROME whose outcomes have these relative errors in float32, and none in float64."""

    def made(setup: Setup) -> Pair:
        pair = METHODS["rome"](setup)
        assert pair.tolerance == 1e-4

        def moved(compute: Compute, error: float) -> Compute:
            def computed(request: EditRequest) -> Outcome:
                factor = 1 + error if setup.lm.module.dtype == torch.float32 else 1.0
                return {name: factor * update for name, update in compute(request).items() if isinstance(update, Tensor)}

            return computed

        return replace(pair, ours=moved(pair.ours, of_ours), plain=moved(pair.plain, of_plain))

    return made


def test_what_only_rounding_tells_apart_is_computed_again_in_float64(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edit_speed, "METHODS", {"rounded": rounded(5e-4, -5e-4)})
    out = tmp_path / "speed.jsonl"
    assert main([*TINY, "--methods", "rounded", "--out", str(out)]) == 0
    (timing,) = told(capsys)["timings"]
    assert timing["same"]
    assert timing["largest_difference"] == pytest.approx(1e-3, rel=0.1)
    assert timing["largest_in_float64"] < 1e-4
    (row,), _ = read_jsonl(out)
    before = {name: value for name, value in row.items() if name not in ("in_float64", "ours_off", "plain_off")}
    append_jsonl(out, [before])  # as a file that was written without them
    assert main([*TINY, "--methods", "rounded", "--out", str(out)]) == 0
    assert told(capsys)["timings"][0]["largest_in_float64"] == timing["largest_in_float64"]


def test_float32_of_ours_that_is_within_the_tolerance_of_float64_is_exact_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edit_speed, "METHODS", {"rounded": rounded(9e-5, -3e-5)})
    assert main([*TINY, "--methods", "rounded"]) == 0
    (timing,) = told(capsys)["timings"]
    assert timing["largest_difference"] == pytest.approx(1.2e-4, rel=0.1)
    assert timing["same"]


def test_float32_of_ours_that_is_less_exact_than_the_straightforward_form_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edit_speed, "METHODS", {"rounded": rounded(1e-3, 0.0)})
    assert main([*TINY, "--methods", "rounded"]) == 1
    (timing,) = told(capsys)["timings"]
    assert timing["largest_in_float64"] < 1e-4
    assert not timing["same"]


def test_a_fact_that_was_measured_is_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.jsonl"
    assert main([*TINY, "--methods", "kn", "--out", str(out)]) == 0
    first = told(capsys)["timings"]
    assert main([*TINY, "--methods", "kn", "--out", str(out)]) == 0
    assert told(capsys)["timings"] == first
    assert len(read_jsonl(out)[0]) == 1
