"""The report on W&B: its specification is written without an account, holds what the page holds, and shows what the runs log."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from editeval.__main__ import main
from editeval.report.study_build import StudyFiles, write_study
from editeval.report.study_tables import RUN_HEADS, SECTIONS
from editeval.report.wandb_report import SPEC_FILE
from editeval.runner.mirrored import rows_on_disk
from editeval.runner.results import ScoreStore
from editeval.runner.tracked_tables import TableRules, tables_of
from editeval.types import ConfigError, EditevalError
from tests.report.synthetic import Planted, PlantedRun, falls_at, write_run, write_study_runs
from tests.wandb_server import WandbServer, wandb_account

LOGGED = {"wandb": {"sample_rows": 5, "retention": ["efficacy.generation"]}}
Sections = Mapping[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of which the last was launched with W&B's tables."""
    found = write_study_runs(tmp_path_factory.mktemp("runs"))
    return [*found[:-1], with_logger(found[-1])]


@pytest.fixture(scope="module")
def files(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> StudyFiles:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return write_study(folders, tmp_path_factory.mktemp("report"), wandb="team/editing")


@pytest.fixture(scope="module")
def sections(files: StudyFiles) -> Sections:
    return sections_of(files)


def with_logger(folder: Path) -> Path:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["logger"] = LOGGED
    path.write_text(json.dumps(manifest))
    return folder


def sections_of(files: StudyFiles) -> Sections:
    """Return the blocks under each heading."""
    found: dict[str, list[dict[str, Any]]] = {}
    for block in json.loads(Path(str(files.wandb)).read_text())["spec"]["blocks"]:
        if block["type"] == "heading":
            assert block["level"] == 1
            found[block["children"][0]["text"]] = []
        elif found:
            found[list(found)[-1]].append(block)
    return found


def words(blocks: list[dict[str, Any]]) -> str:
    return "\n".join(block["content"] for block in blocks if block["type"] == "markdown-block")


def panels(blocks: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    grids = [block["metadata"]["panelBankSectionConfig"]["panels"] for block in blocks if block["type"] == "panel-grid"]
    return [panel["config"] for grid in grids for panel in grid if panel["viewType"] == kind]


def curves(blocks: list[dict[str, Any]]) -> list[str]:
    found = panels(blocks, "Run History Line Plot")
    assert all(config["xAxis"] == "num_edits" for config in found)
    return [name for config in found for name in config["metrics"]]


def tables(blocks: list[dict[str, Any]]) -> list[str]:
    return [config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"] for config in panels(blocks, "Weave")]


def test_the_specification_is_one_that_the_package_reads_back(files: StudyFiles) -> None:
    from wandb_workspaces.reports.v2.internal import ReportViewspec

    assert files.wandb is not None
    assert Path(files.wandb).name == SPEC_FILE
    model = ReportViewspec.model_validate(json.loads(Path(files.wandb).read_text()))
    assert model.display_name == "Editing: what is gained, what is lost"
    assert (model.project.entity_name, model.project.name) == ("team", "editing")


def test_its_sections_are_those_of_the_page_and_none_is_empty(files: StudyFiles, sections: Sections) -> None:
    on_page = re.findall(r"<h2 id=[^>]*>(.*?)</h2>", files.html.read_text())
    assert list(sections) == [html.unescape(title) for title in on_page] == list(SECTIONS.values())
    for title, blocks in sections.items():
        assert words(blocks) or panels(blocks, "Run History Line Plot") or tables(blocks), title


def test_every_panel_shows_what_the_runs_log(folders: list[Path], sections: Sections) -> None:
    logged = {name for folder in folders for row in rows_on_disk(folder).values() for name in row.numbers}
    store = ScoreStore(folders[-1])
    rules = TableRules(samples=5, retention=("efficacy.generation",))
    cells = dict.fromkeys((score.num_edits, score.benchmark, score.benchmark_key) for score in store.scores())
    tabled = {
        name
        for edits, benchmark, key in cells
        for name in tables_of(store, num_edits=edits, benchmark=benchmark, benchmark_key=key, rules=rules)
    }
    shown = [name for blocks in sections.values() for name in curves(blocks)]
    assert set(shown) <= logged
    of_edits = {f"edit/{name}" for name in ("seconds", "delta_norm", "weight_norm_ratio", "canary_ratio")}
    assert of_edits | {"perplexity/passage.perplexity.likelihood", "truthfulqa/truthfulqa.acc.likelihood"} <= set(shown)
    assert tables(sections[SECTIONS["retention"]]) == ["edit-quality/retention/efficacy.generation"]
    assert set(tables(sections[SECTIONS["items"]])) == {f"{name}/samples" for name in ("edit-quality", "mmlu", "gsm8k", "truthfulqa")}
    assert {name for blocks in sections.values() for name in tables(blocks)} == tabled


def test_every_question_has_its_verdicts_and_edit_quality_beside_what_it_is_about(files: StudyFiles, sections: Sections) -> None:
    for verdict in files.verdicts:
        told = words(sections[SECTIONS[verdict.question]])
        assert f"**{verdict.key}** {verdict.statement} **{verdict.outcome}**\n\n{verdict.reason}" in told
        assert f"{verdict.key} | {verdict.statement} | {verdict.outcome} | {verdict.reason} |" in words(sections["Verdicts"])
    for name in ("rq1", "rq2", "rq3", "rq4", "rq5", "artefacts"):
        plotted = curves(sections[SECTIONS[name]])
        assert plotted[:2] == ["edit-quality/facts.efficacy.generation", "edit-quality/facts.locality.generation"]
        assert ("truthfulqa/truthfulqa.acc.likelihood" if name == "rq5" else "mmlu/mmlu.acc.likelihood") in plotted


def test_what_wandb_does_not_log_is_a_table_of_what_is_on_disk(sections: Sections) -> None:
    runs = words(sections["Runs"])
    assert f"| {' | '.join(RUN_HEADS)} |" in runs
    assert "| 1.500 | 24.140 | 12 s | 1.0 kB | 3.5 GB |" in runs
    assert "| memit, counterfact |" in words(sections[SECTIONS["rq3"]])
    assert "|  | 7B | 13B |" in words(sections[SECTIONS["rq3"]])
    assert "| published code |" in words(sections[SECTIONS["artefacts"]])
    assert panels(sections[SECTIONS["artefacts"]], "Run Comparer") == [{"diffOnly": True}]
    assert "| edits 2–10 | – | " in words(sections[SECTIONS["retention"]])
    assert "norm of edited weights (times unedited), by number of edits\n\n|  | 0 | 1 | 10 |" in words(sections[SECTIONS["monitors"]])
    assert "paired tests on the same items" in words(sections[SECTIONS["changes"]])


def test_what_no_run_has_is_said_to_be_missing(tmp_path: Path) -> None:
    run = PlantedRun(rungs=(1,), benchmarks=(Planted(name="mmlu", kept=falls_at(20)),))
    found = sections_of(write_study([write_run(tmp_path, run)], tmp_path / "out", wandb="team/editing"))
    assert list(found) == list(SECTIONS.values())
    assert "No method was run with several settings, " in words(found[SECTIONS["artefacts"]])
    assert "W&B holds no retention matrix of these runs" in words(found[SECTIONS["retention"]])
    assert "W&B holds no items of these runs" in words(found[SECTIONS["items"]])
    assert "W&B holds no measure of safety of these runs." in words(found[SECTIONS["rq5"]])


def test_a_text_of_a_run_stays_in_its_cell(tmp_path: Path) -> None:
    run = PlantedRun(method="a | b\nc", rungs=(1,), benchmarks=(Planted(name="mmlu", kept=falls_at(20)),))
    found = sections_of(write_study([write_run(tmp_path, run)], tmp_path / "out", wandb="team/editing"))
    assert "| tiny | a \\| b c | counterfact | 0 |" in words(found["Runs"])


def test_the_command_writes_the_specification_beside_the_page_and_says_where(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, folders[:2]), "--to", str(tmp_path), "--wandb", "team/editing"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(tmp_path / "report.html"), str(tmp_path / SPEC_FILE)]
    assert json.loads((tmp_path / SPEC_FILE).read_text())["project"] == {"name": "editing", "entityName": "team"}


def test_the_command_refuses_a_target_that_is_no_project(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folders[0]), "--to", str(tmp_path / "out"), "--wandb", "editing"]) == 2
    assert "--wandb 'editing' is not ENTITY/PROJECT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["editing", "/editing", "team/", "a/b/c"])
def test_a_target_that_is_no_project_is_refused(folders: list[Path], tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="is not ENTITY/PROJECT"):
        write_study(folders[:1], tmp_path / "out", wandb=target)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server, and an account there."""
    with WandbServer() as found, wandb_account(monkeypatch):
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        yield found


@pytest.mark.xdist_group("wandb")
def test_with_an_account_it_is_saved_and_built_again_it_takes_its_own_place(
    folders: list[Path], tmp_path: Path, server: WandbServer
) -> None:
    first = write_study(folders[:1], tmp_path, wandb="team/editing").wandb
    assert server.projects == ["editing"]
    (name,) = server.views
    assert str(first).endswith(f"/team/editing/reports/Editing:-what-is-gained,-what-is-lost--{name}")
    assert json.loads(server.views[name]["spec"]) == json.loads((tmp_path / SPEC_FILE).read_text())["spec"]
    of_one_run = server.views[name]["spec"]

    again = write_study(folders[:2], tmp_path, wandb="team/editing").wandb
    assert again == first
    assert list(server.views) == [name]
    assert server.views[name]["spec"] != of_one_run
    write_study(folders[:1], tmp_path, wandb="team/other")
    assert [view["projectName"] for view in server.views.values()] == ["editing", "other"]


@pytest.mark.xdist_group("wandb")
def test_what_the_server_refuses_is_on_disk(folders: list[Path], tmp_path: Path, server: WandbServer) -> None:
    server.always_answer = 404
    with pytest.raises(EditevalError, match=f"W&B did not take the report .*{SPEC_FILE}"):
        write_study(folders[:1], tmp_path, wandb="team/editing")
    assert json.loads((tmp_path / SPEC_FILE).read_text())["project"] == {"name": "editing", "entityName": "team"}
