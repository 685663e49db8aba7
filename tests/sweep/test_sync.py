"""W&B online, against a server in this process: each row exactly once, whatever dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from editeval.inference.edited import EditedModel
from editeval.interfaces import EditEvent, RunState
from editeval.runner.mirrored import LEDGER, rows_on_disk
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import JOURNAL_FOLDER, append_edit, write_manifest
from editeval.runner.wandb_mirror import WandbMirror
from editeval.sweep.sync import SYNCED, sync_run
from editeval.types import EditevalError, Evaluation, Measurement
from tests.wandb_server import WandbServer, wandb_account

KEY = "c0ffee" * 10
RUN = KEY[:12]
RUNGS = (0, 1, 2)
NORM = 1.5
MODEL = cast(EditedModel, None)  # which the mirror does not ask
GIVE_UP_SOON = {"init_timeout_seconds": 3, "finish_timeout_seconds": 3}  # where the server is dead: no wait is worth it
PATIENT = {"init_timeout_seconds": 60, "finish_timeout_seconds": 60}  # where it answers: a busy machine may take its time

pytestmark = [
    pytest.mark.xdist_group("wandb"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]  # a server that dies leaves the client's sockets open


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with wandb_account(monkeypatch):
        yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run on disk: two edits, three rungs, one benchmark."""
    folder = tmp_path / "tiny-rome-facts-c0ffee"
    config = {
        "model": {"name": "tiny"},
        "method": {"name": "rome"},
        "dataset": {"name": "facts"},
        "num_edits": [1, 2],
        "benchmark": {"quick": {}},
    }
    write_manifest(folder, {"edit_key": KEY, "model_fingerprint": "base", "config": config})
    store = ScoreStore(folder)
    for rung in RUNGS:
        if rung:
            append_edit(folder, {**edit(rung), "weight_norm_ratio": NORM})
        measurement = Measurement(task="t", metric="accuracy", protocol="likelihood", value=1 / (rung + 3), n=4)
        store.record(
            Evaluation(measurements=(measurement,)),
            benchmark="quick",
            benchmark_key="k",
            num_edits=rung,
            state_digest=f"s{rung}",
            seconds=1.0,
        )
    return folder


def edit(step: int) -> dict[str, object]:
    diagnostics = {"loss": 0.5 / step}
    return {"step": step, "num_edits": step, "digest": f"d{step}", "seconds": 0.25, "diagnostics": diagnostics, "replayed": False}


def state(run_dir: Path, num_edits: int = 0) -> RunState:
    return RunState(
        run_dir=str(run_dir),
        edit_key=KEY,
        model_name="tiny",
        method_name="rome",
        dataset_name="facts",
        rungs=RUNGS,
        num_edits=num_edits,
        state_digest="base",
        config={"num_edits": [1, 2]},
    )


def live(run_dir: Path, mirror: WandbMirror, rungs: tuple[int, ...] = RUNGS) -> None:
    """Drive a mirror as the runner does, over scores that are on disk."""
    mirror.on_run_start(state(run_dir))
    for rung in rungs:
        if rung:
            row = edit(rung)
            event = EditEvent(
                step=rung,
                num_edits=rung,
                request_ids=("a",),
                seconds=0.25,
                digest=f"d{rung}",
                weights_digest="w",
                replayed=False,
                diagnostics=row["diagnostics"],  # type: ignore[arg-type]
                weight_norm_ratio=NORM,
            )
            mirror.on_edit_end(state(run_dir, rung), event, MODEL)
        mirror.on_evaluation_end(
            state(run_dir, rung), "quick", [score for score in ScoreStore(run_dir).scores() if score.num_edits == rung]
        )


def expected(run_dir: Path) -> list[dict[str, float]]:
    return [row.numbers for row in rows_on_disk(run_dir).values()]


def test_a_run_that_was_never_mirrored_is_sent_once_and_then_no_connection_is_made(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert sync_run(run_dir, **PATIENT) == 5
        assert server.rows(RUN) == expected(run_dir)
        asked = server.requests
        assert sync_run(run_dir, **PATIENT) == 0
        assert server.requests == asked
    assert not {name for name in os.environ if name in ("WANDB_DATA_DIR", "WANDB_MODE")}


def test_tables_and_the_journal_reach_the_server_with_the_numbers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / JOURNAL_FOLDER).mkdir()
    (run_dir / JOURNAL_FOLDER / "segment").write_bytes(b"edits")
    ScoreStore(run_dir).record(
        Evaluation(measurements=(Measurement(task="t", metric="accuracy", protocol="likelihood", value=0.5, n=1),), samples=({"item": 1},)),
        benchmark="other",
        benchmark_key="k",
        num_edits=2,
        state_digest="s2",
        seconds=1.0,
    )
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert sync_run(run_dir, sample_rows=5, log_journal=True, **PATIENT) == 6
        last = server.rows(RUN)[-1]
        assert last["other/t.accuracy.likelihood"] == 0.5
        assert (last["other/samples"]["_type"], last["other/samples"]["nrows"]) == ("table-file", 1)
        assert server.artifacts.count(f"journal-{RUN}") == 1


def test_a_live_online_run_needs_no_sync(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        mirror = WandbMirror(mode="online", group="sweep-1", tags=["a"], **PATIENT)  # type: ignore[arg-type]
        live(run_dir, mirror)
        mirror.on_run_end(state(run_dir), ())
        assert server.rows(RUN) == expected(run_dir)
        assert server.runs[RUN]["groupName"] == "sweep-1"
        assert "rome" in server.runs[RUN]["tags"]
        assert sync_run(run_dir, **PATIENT) == 0
        assert server.rows(RUN) == expected(run_dir)


def test_a_launch_that_lost_rows_before_they_were_sent_is_mended_by_the_next(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        mirror = WandbMirror(mode="online", **PATIENT)  # type: ignore[arg-type]
        live(run_dir, mirror)
        mirror.on_run_end(state(run_dir), ())
        del server.history[RUN][3:]  # what a kill of the whole machine takes away
        assert sync_run(run_dir, **PATIENT) == 2
        assert server.rows(RUN) == expected(run_dir)


def test_a_server_that_dies_during_the_run_costs_the_mirror_alone_and_sync_repairs_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WandbServer()
    with server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        mirror = WandbMirror(mode="online", **{**PATIENT, "finish_timeout_seconds": 3})  # type: ignore[arg-type]
        live(run_dir, mirror, rungs=(0, 1))
    mirror.on_evaluation_end(state(run_dir, 2), "quick", [score for score in ScoreStore(run_dir).scores() if score.num_edits == 2])
    mirror.on_run_end(state(run_dir), ())
    import wandb

    wandb.teardown()
    with WandbServer() as again:  # the same server with what had reached it
        again.history, again.runs = server.history, server.runs
        monkeypatch.setenv("WANDB_BASE_URL", again.url)
        sync_run(run_dir, **PATIENT)
        rows = again.rows(RUN)
    assert sorted(map(repr, map(sorted, (row.items() for row in rows)))) == sorted(
        map(repr, map(sorted, (row.items() for row in expected(run_dir))))
    )


@pytest.mark.parametrize("before", [(), (0, 1)], ids=["from the start", "in the middle"])
def test_a_storm_of_429_costs_the_mirror_alone_and_sync_repairs_it(
    before: tuple[int, ...], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = {**PATIENT, "finish_timeout_seconds": 3} if before else GIVE_UP_SOON
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        mirror = WandbMirror(mode="online", **patience)  # type: ignore[arg-type]
        live(run_dir, mirror, rungs=before)
        server.always_answer = 429
        for rung in RUNGS[len(before) :]:
            mirror.on_evaluation_end(state(run_dir, rung), "quick", [one for one in ScoreStore(run_dir).scores() if one.num_edits == rung])
        mirror.on_run_end(state(run_dir), ())
        import wandb

        wandb.teardown()
        server.always_answer = None
        sync_run(run_dir, **PATIENT)
        assert sorted(repr(sorted(row.items())) for row in server.rows(RUN)) == sorted(
            repr(sorted(row.items())) for row in expected(run_dir)
        )


def test_a_server_that_refuses_everything_costs_a_clear_error_and_marks_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer(always_answer=429) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with pytest.raises(EditevalError, match="editeval sync"):
            sync_run(run_dir, **GIVE_UP_SOON)
    assert not (run_dir / SYNCED).exists()
    assert len((run_dir / LEDGER).read_text().splitlines()) == 5
