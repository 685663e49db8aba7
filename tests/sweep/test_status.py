"""What a job's state is said to be, given what lies on disk and in the queue."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from editeval.interfaces import RunState
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import write_collapse, write_manifest
from editeval.sweep import records
from editeval.sweep.plan import Job, job_id
from editeval.sweep.records import JobRecord, PlannedJob, Process, SweepRecord
from editeval.sweep.show import show_status
from editeval.sweep.status import JobStatus, RunFolder, last_line, unfinished
from editeval.sweep.watch import watching
from editeval.types import EditevalError, Evaluation, Measurement, Score

JOB = PlannedJob(job="j1", overrides=("seed=0",), rungs=(0, 5), benchmarks=("quick",))
RUN = "tiny-rome-facts-1"
GONE = Process(machine=os.uname().nodename, pid=2**22 + 1, started=1)
ELSEWHERE = Process(machine="another-node", pid=1, started=1)


def record(**fields: Any) -> JobRecord:
    usual: dict[str, Any] = {
        "job": JOB.job,
        "overrides": JOB.overrides,
        "code": "c",
        "state": records.RUNNING,
        "process": Process.current(),
        "started_at": "",
        "updated_at": "",
        "run_dir": RUN,
    }
    return JobRecord(**{**usual, **fields})


def measure(runs: Path, rungs: Sequence[int], run: str = RUN) -> None:
    for rung in rungs:
        measured = Measurement(task="t", metric="accuracy", protocol="likelihood", value=0.5, n=4)
        ScoreStore(runs / run).record(
            Evaluation(measurements=(measured,)), benchmark="quick", benchmark_key="k", num_edits=rung, state_digest=f"s{rung}", seconds=1.0
        )


def status(runs: Path, job: PlannedJob = JOB, queue: dict[str, str] | None = None) -> JobStatus:
    return RunFolder(runs, queue=queue or {}).planned(job)


def test_a_job_is_done_when_all_its_scores_are_there_whatever_its_record_says(tmp_path: Path) -> None:
    measure(tmp_path, (0, 5))
    records.write_job(tmp_path, record(state=records.FAILED, error="late"))
    assert status(tmp_path).state == "done"


@pytest.mark.parametrize(
    ("kept", "queue_id", "queue", "expected"),
    [
        (None, None, {}, "missing"),
        (None, "7_0", {"7_0": "PENDING"}, "queued"),
        (None, "7_0", {}, "failed"),
        (record(), None, {}, "running"),
        (record(process=GONE), None, {}, "failed"),
        (record(process=ELSEWHERE), None, {}, "running"),
        (record(process=ELSEWHERE, queue_id="7_0"), "7_0", {"7_0": "RUNNING"}, "running"),
        (record(process=ELSEWHERE, queue_id="7_0"), "7_0", {"7_0": "PENDING"}, "queued"),
        (record(process=ELSEWHERE, queue_id="7_0"), "7_0", {"7_1": "RUNNING"}, "failed"),
        (record(state=records.INTERRUPTED, error="SystemExit: -1", queue_id="7_0"), "7_0", {"7_0": "PENDING"}, "queued"),
        (record(state=records.FAILED, error="ConfigError: no"), None, {}, "failed"),
        (record(state=records.STOPPED, stopped="edit 3 broke it"), None, {}, "stopped"),
        (record(state=records.DONE), None, {}, "missing"),
    ],
)
def test_the_state_of_a_job_that_is_not_finished(
    kept: JobRecord | None, queue_id: str | None, queue: dict[str, str], expected: str, tmp_path: Path
) -> None:
    measure(tmp_path, (0,))
    if kept is not None:
        records.write_job(tmp_path, kept)
    found = status(tmp_path, replace(JOB, queue_id=queue_id), queue)
    assert found.state == expected
    assert (found.job in unfinished([found])) is (expected in ("failed", "missing"))
    if kept is not None:
        assert found.missing_rungs == (5,)


def test_a_process_that_is_gone_is_told_by_the_last_line_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    log.write_text("fine\nslurmstepd: error: Detected 1 oom-kill event\n\n")
    records.write_job(tmp_path, record(process=GONE, log=str(log)))
    found = status(tmp_path)
    assert (found.reason, found.log) == ("slurmstepd: error: Detected 1 oom-kill event", str(log))
    log.unlink()
    assert status(tmp_path).reason == "ended without a word; its process is gone"
    assert last_line(None) is None


def test_a_process_with_the_same_id_after_a_reboot_is_not_taken_for_the_job(tmp_path: Path) -> None:
    mine = Process.current()
    assert mine.alive() is True
    assert replace(mine, started=mine.started + 1).alive() is False
    assert ELSEWHERE.alive() is None
    child = subprocess.Popen([sys.executable, "-c", ""])
    child_process = replace(mine, pid=child.pid, started=0)
    child.wait()
    assert child_process.alive() is False


def test_a_collapse_is_shown_also_where_the_run_went_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(tmp_path, (0, 5))
    write_manifest(tmp_path / RUN, {"edit_key": "e", "model_fingerprint": "s", "config": {}})
    records.write_job(tmp_path, record(state=records.DONE, rungs=(0, 5), benchmarks=("quick",)))
    write_collapse(tmp_path / RUN, step=3, digest="d", request_ids=["f3"], reason="edit 3 brought a norm to 9 times")
    show_status(tmp_path, use_queue=False)
    assert "collapsed: edit 3 brought a norm to 9 times" in capsys.readouterr().out


def test_a_run_without_a_record_is_listed_by_what_its_manifest_wants(tmp_path: Path) -> None:
    config = {"num_edits": [5], "benchmark": {"quick": {}}}
    for run in (RUN, "other"):
        write_manifest(tmp_path / run, {"edit_key": "e", "model_fingerprint": "s", "config": config})
    measure(tmp_path, (0, 5))
    measure(tmp_path, (0,), run="other")
    found = RunFolder(tmp_path, queue={}).others(())
    assert {(status.run_dir, status.state) for status in found} == {(RUN, "done"), ("other", "missing")}


def test_a_damaged_record_counts_as_never_started_and_hides_no_other(tmp_path: Path) -> None:
    records.write_job(tmp_path, record(job="j2"))
    (tmp_path / records.JOBS / "j1.json").write_text('{"job": "j1", "state')
    assert set(records.read_jobs(tmp_path)) == {"j2"}
    assert status(tmp_path).state == "missing"


def test_a_sweep_survives_a_round_trip_and_a_later_versions_fields(tmp_path: Path) -> None:
    jobs = [Job(overrides=("seed=0", "num_edits=[5]"), rungs=(0, 5), benchmarks=("quick",))]
    planned = PlannedJob(job=jobs[0].id, overrides=jobs[0].overrides, rungs=jobs[0].rungs, benchmarks=jobs[0].benchmarks)
    sweep = SweepRecord(sweep=records.sweep_id(jobs), command=("launch.py", "-m"), folder="/x", made_at="", jobs=(planned,))
    path = records.write_sweep(tmp_path, sweep)
    assert records.read_sweep(tmp_path, sweep.sweep) == sweep
    path.write_text(path.read_text().replace('"made_at"', '"of_tomorrow": 1, "made_at"'))
    assert records.read_sweep(tmp_path, sweep.sweep) == sweep
    with pytest.raises(EditevalError, match=f"no sweep abc in .*; known: {sweep.sweep}"):
        records.read_sweep(tmp_path, "abc")


def run_state(runs: Path, **fields: Any) -> RunState:
    usual: dict[str, Any] = {
        "run_dir": str(runs / RUN),
        "edit_key": "e",
        "model_name": "tiny",
        "method_name": "rome",
        "dataset_name": "facts",
        "rungs": (0, 5),
        "num_edits": 0,
        "state_digest": "s",
        "config": {"benchmark": {"quick": {}}},
    }
    return RunState(**{**usual, **fields})


def score(num_edits: int) -> Score:
    return Score(
        benchmark="quick", task="t", metric="m", protocol="p", value=0.0, n=1, num_edits=num_edits, state_digest="s", benchmark_key="k",
        seconds=0.0,
    )  # fmt: skip


def test_a_launch_leaves_a_record_of_how_it_ended(tmp_path: Path) -> None:
    overrides = ["seed=3", "hydra.verbose=true"]

    def kept() -> JobRecord:
        found = records.read_job(tmp_path, job_id(overrides))
        assert found is not None
        return found

    with watching(tmp_path, overrides) as watch:
        watch.on_run_start(run_state(tmp_path))
        assert (kept().state, kept().run_dir, kept().rungs, kept().benchmarks) == ("running", RUN, (0, 5), ("quick",))
        watch.on_run_end(run_state(tmp_path), [score(0), score(5)])
    assert (kept().state, kept().launches, kept().overrides) == ("done", 1, ("seed=3",))
    with watching(tmp_path, overrides) as watch:
        watch.on_run_start(run_state(tmp_path))
        watch.on_run_end(run_state(tmp_path, stopped="edit 3 broke it"), [score(0)])
    assert (kept().state, kept().stopped, kept().launches) == ("stopped", "edit 3 broke it", 2)
    with pytest.raises(EditevalError), watching(tmp_path, overrides):
        raise EditevalError("first line\nlast line")
    assert (kept().state, kept().error) == ("failed", "EditevalError: last line")
    with pytest.raises(KeyboardInterrupt), watching(tmp_path, overrides):
        raise KeyboardInterrupt
    assert (kept().state, kept().error) == ("interrupted", "KeyboardInterrupt")


def test_a_launch_that_only_prepares_is_done_though_it_measured_nothing(tmp_path: Path) -> None:
    overrides = ("method=memit", "prepare_only=true")
    with watching(tmp_path, overrides):
        pass
    job = replace(JOB, job=job_id(overrides), overrides=overrides)
    assert status(tmp_path, job).state == "done"


def test_a_record_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runs = tmp_path / "file" / "runs"
    with watching(runs, ["seed=1"]) as watch:
        watch.on_run_start(run_state(tmp_path))
        assert (watch._record.state, watch._record.run_dir) == (records.RUNNING, RUN)
    assert watch._record.state == records.DONE
    assert records.read_job(runs, job_id(["seed=1"])) is None


def test_a_slurm_that_does_not_answer_is_no_reason_to_call_jobs_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    records.write_job(tmp_path, record(queue_id="7"))
    with pytest.raises(EditevalError, match="--no-queue"):
        status_with_queue(tmp_path)
    program.unlink()
    assert status_with_queue(tmp_path).state == "failed"


def status_with_queue(runs: Path) -> JobStatus:
    return RunFolder(runs).planned(replace(JOB, queue_id="7"))
