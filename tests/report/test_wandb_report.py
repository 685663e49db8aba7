"""The report on W&B: its specification is written without an account and holds what the page holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editeval.report.findings import findings
from editeval.report.series import series_of
from editeval.report.study import read_study, studies
from editeval.report.wandb_report import write_wandb_report
from editeval.types import ConfigError
from tests.report.synthetic import Planted, PlantedRun, falls_at, write_run


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def specification(tmp_path: Path) -> dict[str, object]:
    known = studies()
    runs = [PlantedRun(method=method, benchmarks=(Planted(name="mmlu", kept=falls_at(20)),)) for method in ("rome", "memit")]
    series = series_of(read_study([write_run(tmp_path, run) for run in runs], known), known)
    path = write_wandb_report("team/editing", series, findings(series, known), tmp_path, title="Editing")
    found: dict[str, object] = json.loads(Path(path).read_text())
    return found


def test_the_specification_is_one_that_the_package_reads_back(tmp_path: Path) -> None:
    from wandb_workspaces.reports.v2.internal import ReportViewspec

    model = ReportViewspec.model_validate(specification(tmp_path))
    assert model.display_name == "Editing"
    assert model.project.name == "editing"


def test_every_question_has_a_section_its_verdict_and_curves_over_the_number_of_edits(tmp_path: Path) -> None:
    text = json.dumps(specification(tmp_path))
    for wanted in (
        "RQ1",
        "RQ2",
        "RQ3",
        "RQ4",
        "RQ5",
        "F4.1a",
        "F4.5",
        "UNDECIDED",
        "edit-quality/facts.efficacy.generation",
        "mmlu/mmlu.acc.likelihood",
    ):
        assert wanted in text, wanted
    assert text.count('"num_edits"') >= 5


@pytest.mark.parametrize("target", ["editing", "/editing", "team/", "a/b/c"])
def test_a_target_that_is_no_project_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="is not ENTITY/PROJECT"):
        write_wandb_report(target, (), (), tmp_path, title="x")
