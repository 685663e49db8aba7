"""RQ2 and RQ3 in their small forms: their models are a pair and a family, so that the report has the figures and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.experiment import run
from editeval.report.findings import findings
from editeval.report.series import Series, series_of
from editeval.report.study import read_study, studies
from editeval.report.study_charts import charts
from editeval.report.verdicts import Outcome, Verdict
from tests.report.synthetic import Planted, PlantedRun, falls_at, write_run

KNOWN = studies()
PAIR = next(pair for pair in KNOWN.pairs if pair["family"] == "Tiny Llama (random)")
SIZES = KNOWN.families["Tiny NeoX (random)"]


def read(folders: list[Path]) -> tuple[tuple[Series, ...], dict[str, Verdict], set[str]]:
    series = series_of(read_study(folders, KNOWN), KNOWN)
    return series, {found.key: found for found in findings(series, KNOWN)}, {chart.name for chart in charts(series, KNOWN)}


def test_runs_of_the_small_pair_have_the_figure_and_the_numbers_of_rq2(tmp_path: Path) -> None:
    runs = [
        PlantedRun(model=model, seed=seed, benchmarks=(Planted(name="mmlu", kept=falls_at(edits), n=300),))
        for model, edits in ((PAIR["base"], 20), (PAIR["tuned"], 200))
        for seed in range(3)
    ]
    _, verdicts, names = read([write_run(tmp_path, one) for one in runs])
    assert "rq2-tiny-llama-random" in names
    assert verdicts["F4.2"].table[1][:4] == ("Tiny Llama (random)", "rome", "counterfact", "3")


def test_runs_of_the_small_family_have_the_figure_and_the_numbers_of_rq3(tmp_path: Path) -> None:
    runs = [
        PlantedRun(model=model, rungs=(1, 10), benchmarks=(Planted(name="mmlu", kept=falls_at(2 * 2**place), n=300),))
        for place, model in enumerate(SIZES)
    ]
    _, verdicts, names = read([write_run(tmp_path, one) for one in runs])
    assert "rq3-tiny-neox-random" in names
    assert verdicts["F4.3"].table[1][:6] == ("Tiny NeoX (random)", "rome", "counterfact", "10", "1", "5")


@pytest.mark.parametrize(
    ("sweep", "models", "key", "reason"),
    [
        ("rq2-small", [["model=tiny-llama", f"model.seed={seed}"] for seed in (0, 1)], "F4.2", "No pair of a base and a tuned model"),
        ("rq3-small", [["model=tiny-neox", f"model.num_layers={layers}"] for layers in (2, 3)], "F4.3", "No family was measured at enough"),
    ],
)
def test_runs_of_a_small_sweep_are_read_as_its_question_and_decide_nothing(
    compose_config: Callable[..., DictConfig], tmp_path: Path, sweep: str, models: list[list[str]], key: str, reason: str
) -> None:
    small = ["method=ft-l", "method.num_steps=1", "num_edits=1", "benchmark=edit-quality", "dataset.known_only=false"]
    small += ["benchmark.edit-quality.fluency_facts=0", "callback={}", "logger=[]", f"paths.runs={tmp_path}"]
    for model in models:
        run(compose_config(f"sweep={sweep}", *model, *small))
    series, verdicts, names = read([path.parent for path in tmp_path.glob("*/manifest.json")])
    known = {PAIR["base"], PAIR["tuned"]} if sweep == "rq2-small" else set(SIZES)
    assert {one.model for one in series} <= known
    assert len(series) == 2
    assert verdicts[key].outcome == Outcome.UNDECIDED
    assert reason in verdicts[key].reason  # they know nothing, so nothing can be lost
    assert {"rq2-small": "rq2-tiny-llama-random", "rq3-small": "rq3-tiny-neox-random"}[sweep] in names
