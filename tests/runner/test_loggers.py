"""Console, CSV and W&B show what `scores.jsonl` holds, and none of them can end a run."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from editeval.inference.edited import EditedModel
from editeval.interfaces import EditEvent, RunState
from editeval.runner.loggers import SCORES_CSV, ConsoleLogger, CsvLogger
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import JOURNAL_FOLDER, write_manifest
from editeval.runner.wandb_mirror import WandbMirror, has_wandb_account
from editeval.types import Evaluation, Measurement, Score
from tests.runner.offline import history, offline_records

MODEL = cast(EditedModel, SimpleNamespace(edited_parameters=()))


def measure(store: ScoreStore, num_edits: int, *, arithmetic: float, perplexity: float) -> tuple[Score, ...]:
    def measurement(task: str, metric: str, protocol: str, value: float, **fields: Any) -> Measurement:
        return Measurement(task=task, metric=metric, protocol=protocol, value=value, n=60, **fields)

    evaluation = Evaluation(
        measurements=(
            measurement("arithmetic", "acc_norm", "cloze", arithmetic, stderr=0.06, chance=0.25),
            measurement("perplexity", "perplexity", "rolling", perplexity, higher_is_better=False),
        )
    )
    return store.record(
        evaluation, benchmark="quick", benchmark_key="q" * 64, num_edits=num_edits, state_digest=f"d{num_edits}", seconds=0.5
    )


def run_state(run_dir: Path, num_edits: int = 0) -> RunState:
    return RunState(
        run_dir=str(run_dir),
        edit_key="0123456789abcdef" * 4,
        model_name="tiny",
        method_name="rome",
        dataset_name="facts",
        rungs=(0, 1, 10),
        num_edits=num_edits,
        state_digest=f"d{num_edits}",
        config={"method": {"name": "rome", "layer": 5}},
    )


def edit_event(step: int) -> EditEvent:
    return EditEvent(
        step=step,
        num_edits=step,
        request_ids=("a",),
        seconds=1.5,
        digest=f"d{step}",
        weights_digest="w",
        replayed=False,
        diagnostics={"loss": 0.25},
        weight_norm_ratio=1.0,
        canary_ratio=1.25 if step == 10 else None,
    )


@pytest.fixture
def scores(tmp_path: Path) -> tuple[Score, ...]:
    store = ScoreStore(tmp_path)
    measure(store, 0, arithmetic=0.3, perplexity=30.5)
    measure(store, 1, arithmetic=1 / 3, perplexity=31.25)
    measure(store, 10, arithmetic=0.1, perplexity=math.inf)
    return store.scores()


# -- console and CSV -------------------------------------------------------------------------------------------------------


def printed(scores: tuple[Score, ...], tmp_path: Path, width: int = 140) -> str:
    text = io.StringIO()
    ConsoleLogger(console=Console(file=text, width=width)).on_run_end(run_state(tmp_path), scores)
    return text.getvalue()


def test_the_final_table_has_a_row_for_chance_for_the_unedited_model_and_for_each_rung(tmp_path: Path, scores: tuple[Score, ...]) -> None:
    rows = [line.split() for line in printed(scores, tmp_path).splitlines()]
    assert ["chance", "0.250", "–"] in rows
    assert ["unedited", "0.300", "30.500"] in rows
    assert ["1", "edit", "0.333", "31.250"] in rows
    assert ["10", "edits", "0.100", "inf"] in rows


def test_a_benchmark_that_starts_at_chance_is_marked(tmp_path: Path, scores: tuple[Score, ...]) -> None:
    assert "cloze*" in printed(scores, tmp_path)  # 0.30 +- 1.96 * 0.06 holds 0.25
    assert "cannot show damage" in printed(scores, tmp_path)


def test_a_narrow_terminal_shows_every_number_of_a_wide_table(tmp_path: Path) -> None:
    measurements = tuple(Measurement(task=f"task{i}", metric="acc", protocol="likelihood", value=0.101 + i / 1000, n=9) for i in range(8))
    scores = ScoreStore(tmp_path).record(
        Evaluation(measurements=measurements), benchmark="many", benchmark_key="m", num_edits=0, state_digest="d", seconds=1
    )
    text = printed(scores, tmp_path, width=60)
    assert all(f"{score.value:.3f}" in text for score in scores)
    assert max(len(line) for line in text.splitlines()[:-1]) <= 60


def test_csv_holds_every_field_with_every_digit(tmp_path: Path, scores: tuple[Score, ...]) -> None:
    CsvLogger().on_run_end(run_state(tmp_path), scores)
    with (tmp_path / SCORES_CSV).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [score.value for score in scores]
    assert [(row["task"], int(row["num_edits"]), row["state_digest"]) for row in rows] == [
        (score.task, score.num_edits, score.state_digest) for score in scores
    ]
    assert rows[1]["stderr"] == ""


def test_csv_of_an_unfinished_run_holds_what_was_measured(tmp_path: Path, scores: tuple[Score, ...]) -> None:
    logger = CsvLogger()
    logger.on_run_start(run_state(tmp_path))
    logger.on_evaluation_end(run_state(tmp_path, 0), "quick", scores[:2])
    logger.on_evaluation_end(run_state(tmp_path, 1), "quick", scores[2:4])
    assert len((tmp_path / SCORES_CSV).read_text().splitlines()) == 1 + 4


# -- W&B -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """wandb adds handlers to its logger; take them away again."""
    logger = logging.getLogger("wandb")
    handlers = list(logger.handlers)
    yield
    logger.handlers[:] = handlers


def mirror_run(mirror: WandbMirror, run_dir: Path, scores: tuple[Score, ...]) -> None:
    """Drive the mirror through a whole run, as the runner does."""
    mirror.on_run_start(run_state(run_dir))
    for rung in (0, 1, 10):
        if rung:
            mirror.on_edit_end(run_state(run_dir, rung), edit_event(rung), MODEL)
        mirror.on_evaluation_end(run_state(run_dir, rung), "quick", [score for score in scores if score.num_edits == rung])
    mirror.on_run_end(run_state(run_dir), scores)


@pytest.mark.usefixtures("no_account", "quiet_logging")
def test_without_an_account_wandb_mirrors_every_score_offline_and_only_once(
    tmp_path: Path, scores: tuple[Score, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    mirror_run(WandbMirror(tags=["test"]), tmp_path, scores)
    assert not {"WANDB_MODE", "WANDB_DATA_DIR"} & set(os.environ), "what one run sets must not reach the next"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, "one line, not wandb's banner"
    assert "W&B logs offline to" in said[0]

    records = offline_records(tmp_path)
    names = {math.inf: "Infinity"}
    expected = {(score.num_edits, score.name): names.get(score.value, score.value) for score in ScoreStore(tmp_path).scores()}
    logged = history(records)
    assert {key: value for key, value in logged.items() if key[1].startswith("quick/")} == expected
    assert logged[(1, "edit/loss")] == 0.25
    assert logged[(10, "edit/seconds")] == 1.5
    assert logged[(10, "edit/weight_norm_ratio")] == 1.0
    assert logged[(10, "edit/canary_ratio")] == 1.25
    assert (1, "edit/canary_ratio") not in logged, "it is measured at rungs"

    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert run["run_id"] == run_state(tmp_path).edit_key[:12], "the id is the trajectory's, on every launch"
    assert set(run["tags"]) == {"test", "tiny", "rome", "facts"}
    axes = [record["metric"] for record in records if record["type"] == "metric" and record["metric"].get("glob_name") == "*"]
    assert axes[-1]["step_metric"] == "num_edits"

    mirror_run(WandbMirror(), tmp_path, scores)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1, "a finished run starts no W&B run"

    more = (*scores, *measure(ScoreStore(tmp_path), 10, arithmetic=0.1, perplexity=math.inf))
    other = [Score(**{**vars(score), "benchmark": "mmlu"}) for score in more[-2:]]
    resumed = WandbMirror()
    resumed.on_run_start(run_state(tmp_path))
    resumed.on_evaluation_end(run_state(tmp_path, 10), "mmlu", other)
    resumed.on_run_end(run_state(tmp_path), more)
    assert len(history(offline_records(tmp_path))) == len(logged) + 2, "a resumed run adds what is new, and nothing twice"


@pytest.mark.usefixtures("no_account", "quiet_logging")
def test_tables_show_the_items_and_which_earlier_facts_are_still_there(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores: list[Score] = []
    for rung, outcomes in ((1, {1: 1.0}), (2, {1: 0.0, 2: 1.0})):
        samples = tuple(
            {"request_id": f"fact-{position}", "position": position, "metric": "efficacy", "outcomes": {"generation": [value]}}
            for position, value in outcomes.items()
        )
        measurement = Measurement(task="facts", metric="efficacy", protocol="generation", value=0.5, n=len(samples))
        evaluation = Evaluation(measurements=(measurement,), samples=samples)
        scores += store.record(
            evaluation, benchmark="quality", benchmark_key=f"k{rung}", num_edits=rung, state_digest=f"d{rung}", seconds=1
        )
    (tmp_path / JOURNAL_FOLDER).mkdir()
    (tmp_path / JOURNAL_FOLDER / "segment").write_bytes(b"edits")
    write_manifest(tmp_path, {"edit_key": "e", "model_fingerprint": "s", "config": {}})

    mirror = WandbMirror(sample_rows=1, retention=["efficacy.generation", "efficacy.probability"], log_journal=True)
    mirror.on_run_start(run_state(tmp_path))
    for rung in (1, 2):
        mirror.on_evaluation_end(run_state(tmp_path, rung), "quality", [score for score in scores if score.num_edits == rung])
    mirror.on_run_end(run_state(tmp_path), scores)

    records = offline_records(tmp_path)
    (files,) = (tmp_path / "wandb").glob("offline-run-*/files")
    last = {name: value for (rung, name), value in history(records).items() if rung == 2}
    paths = {name.removesuffix(".path"): value for name, value in last.items() if name.endswith(".path")}
    tables = {name: json.loads((files / path).read_text()) for name, path in paths.items()}
    assert tables["quality/retention/efficacy.generation"]["columns"] == ["position", "request_id", "after 1", "after 2"]
    assert tables["quality/retention/efficacy.generation"]["data"] == [[1, "fact-1", 1.0, 0.0], [2, "fact-2", None, 1.0]]
    assert "quality/retention/efficacy.probability" not in tables, "nothing was asked in that form"
    shown = tables["quality/samples"]
    assert [dict(zip(shown["columns"], line, strict=True))["request_id"] for line in shown["data"]] == ["fact-1"], "as many as asked for"
    assert last["quality/facts.efficacy.generation"] == 0.5, "the numbers stand beside the tables"
    assert f"journal-{run_state(tmp_path).edit_key[:12]}" in json.dumps(records)


@pytest.mark.usefixtures("no_account")
def test_any_failure_of_wandb_costs_one_warning_and_not_the_run(
    tmp_path: Path, scores: tuple[Score, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log_metrics(self, numbers: Mapping[str, float]) -> None:
            raise RuntimeError("server on fire\nwith a long story")

        @property
        def experiment(self) -> Any:
            raise TimeoutError("never")

    monkeypatch.setattr(WandbMirror, "_open", lambda self, state, *, offline: Broken())
    mirror_run(WandbMirror(), tmp_path, scores)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "mirror stopped" in line]
    assert warnings[0] == "W&B mirror stopped (RuntimeError: server on fire); the scores are complete in scores.jsonl"
    assert len([line for line in warnings if "server on fire" in line]) == 1


@pytest.mark.usefixtures("no_account", "quiet_logging")
def test_a_dead_server_at_the_start_means_offline_with_every_score(
    tmp_path: Path, scores: tuple[Score, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # closed again below: nobody answers there
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    mirror_run(WandbMirror(init_timeout_seconds=2), tmp_path, scores)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.match(r"W&B cannot be reached \(CommError: .*\); logging offline", said[0])
    logged = history(offline_records(tmp_path))
    assert len([name for _, name in logged if name.startswith("quick/")]) == len(scores)


@pytest.mark.usefixtures("no_account")
def test_disabled_wandb_does_nothing(tmp_path: Path, scores: tuple[Score, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror_run(WandbMirror(mode="online"), tmp_path, scores)
    assert not (tmp_path / "wandb").exists()


@pytest.mark.usefixtures("no_account")
def test_an_account_is_found_in_the_environment_or_in_netrc_for_the_right_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_wandb_account()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert has_wandb_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_account()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_wandb_account()


def test_importing_the_loggers_imports_neither_wandb_nor_lightning() -> None:
    heavy = ("wandb", "lightning", "matplotlib")
    code = f"import sys, editeval.runner.loggers, editeval.runner.wandb_mirror; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='on' is not one of auto, online, offline, disabled"):
        WandbMirror(mode=cast(Any, "on"))


def test_a_retention_that_names_no_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match=r"retention='efficacy' is not METRIC\.PROTOCOL"):
        WandbMirror(retention=["efficacy"])
