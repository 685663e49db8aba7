"""What must be the same on two models before the report compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from editeval.report.series import Series, series_of
from editeval.report.settings import across_models
from editeval.report.study import read_study
from editeval.report.verdicts import Outcome
from tests.report.synthetic import Planted, PlantedRun, falls_at, write_run
from tests.report.test_findings import KNOWN, THREE, study, verdict

PYTHIA_LAYERS = dict(zip(("160m", "410m", "1b", "2.8b", "6.9b", "12b"), (3, 7, 7, 5, 5, 5), strict=True))  # of sweep=paper-pythia


def planted(edits: float) -> tuple[Planted, ...]:
    return (Planted(name="mmlu", kept=falls_at(edits), n=200),)


def pairs(settings: Mapping[str, Mapping[str, Any]]) -> list[PlantedRun]:
    """Runs of three methods and orders in which the tuned model falls later, with these settings of each model."""
    return [
        PlantedRun(model=model, method=method, seed=seed, rungs=(10, 100), benchmarks=planted(edits), settings=settings.get(model, {}))
        for method in THREE
        for model, edits in (("llama2-7b", 20), ("llama2-7b-chat", 200))
        for seed in range(3)
    ]


def configured(root: Path, runs: list[PlantedRun], model: str, change: Mapping[str, Any]) -> tuple[Series, ...]:
    """Series of runs, those of one model with another config."""
    folders = [write_run(root, run) for run in runs]
    for folder, run in zip(folders, runs, strict=True):
        if run.model == model:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["config"] |= {
                name: {**manifest["config"][name], **value} if isinstance(value, dict) else value for name, value in change.items()
            }
            (folder / "manifest.json").write_text(json.dumps(manifest))
    return series_of(read_study(folders, KNOWN), KNOWN)


def test_a_pair_that_was_edited_in_other_layers_is_not_compared(tmp_path: Path) -> None:
    same = {model: {"layers": [4, 5, 6, 7, 8]} for model in ("llama2-7b", "llama2-7b-chat")}
    assert verdict(study(tmp_path / "same", pairs(same)), "F4.2").outcome == Outcome.CONFIRMED
    found = verdict(study(tmp_path / "other", pairs({**same, "llama2-7b-chat": {"layers": [12]}})), "F4.2")
    assert (found.outcome, len(found.table)) == (Outcome.UNDECIDED, 1)
    assert "Not compared" in found.reason
    assert "rome on llama2-7b (layers [4, 5, 6, 7, 8] / [12])" in found.reason


@pytest.mark.parametrize(
    ("change", "told"), [({"batch_size": 10}, "batch 1 / 10"), ({"model": {"dtype": "float16"}}, "dtype default / float16")]
)
def test_a_pair_of_another_batch_or_precision_is_not_compared(tmp_path: Path, change: Mapping[str, Any], told: str) -> None:
    found = verdict(configured(tmp_path, pairs({})[:6], "llama2-7b-chat", change), "F4.2")
    assert len(found.table) == 1
    assert f"rome on llama2-7b ({told})" in found.reason


@pytest.mark.parametrize("change", [{"model": {"revision": "abc"}}, {"prompt_format": "chat"}])
def test_revisions_are_each_model_s_own_and_prompts_may_have_another_format(tmp_path: Path, change: Mapping[str, Any]) -> None:
    assert len(verdict(configured(tmp_path, pairs({})[:6], "llama2-7b-chat", change), "F4.2").table) == 2


def test_files_of_a_model_and_rows_that_are_left_out_may_differ_and_what_it_learned_from_may_not() -> None:
    def method(**change: Any) -> dict[str, Any]:
        training = {"_target_": "T", "name": "counterfact", "of": {"data": "/a"}, "without": {"file": "/b"}}
        return {"_target_": "M", "layers": None, "corpus": {"tokens": 1}, "covariance": "/a/one", "training": training, **change}

    first = across_models(method())
    assert first == {"layers": None, "covariance": True, "training.name": "counterfact"}
    other = {"name": "counterfact", "of": {"data": "/c"}}
    assert across_models(method(_target_="N", corpus=None, covariance="/b/two", training=other)) == first
    assert across_models(method(covariance=None)) != first
    assert across_models(method(training={"name": "zsre"})) != first
    assert across_models({"of": method()}) == {f"of.{name}": value for name, value in first.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_sizes_that_were_edited_at_other_depths_have_no_test(tmp_path: Path, wrapped: bool) -> None:
    def runs(layers: Mapping[str, int | None]) -> list[PlantedRun]:
        return [
            PlantedRun(
                model=f"pythia-{size}",
                method=method,
                rungs=(10,),
                benchmarks=planted(5 * 2**place),
                settings={"of": {"layer": layers[size]}} if wrapped else {"layer": layers[size]},
            )
            for place, size in enumerate(layers)
            for method in THREE[:2]
        ]

    relative = verdict(study(tmp_path / "relative", runs(dict.fromkeys(PYTHIA_LAYERS))), "F4.3")
    assert relative.outcome == Outcome.CONFIRMED
    paper = verdict(study(tmp_path / "paper", runs(PYTHIA_LAYERS)), "F4.3")
    assert (paper.outcome, len(paper.table)) == (Outcome.UNDECIDED, 1)
    assert f"Pythia rome (other settings at some sizes: {'of.' if wrapped else ''}layer)" in paper.reason
