"""`hydra/launcher=processes`: what a cluster does to jobs, done to processes of this machine. Runs where there is no Slurm, too."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sweep.commands import Program

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("test_processes")]  # they share what a fixture makes

EDITS = 8
# Slow enough to be hit in the middle: many steps over the published number of prefixes.
GRID = ("seed=0,1", f"num_edits=[1,{EDITS}]", "method.num_steps=60", "method.prefix_lengths=[[5,10],[10,10]]")
PROCESSES = ("hydra/launcher=processes", "hydra.launcher.array_parallelism=2")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Program:
    program = Program(runs=tmp_path_factory.mktemp("unbroken"), cache=cache_dir)
    program.launch("-m", *GRID)
    return program


def running(program: Program) -> list[dict[str, Any]]:
    """The records of the jobs at work, the one that has got furthest first."""
    found = [json.loads(path.read_text()) for path in (program.runs / ".jobs").glob("*.json")]
    return sorted((job for job in found if job["state"] == "running"), key=lambda job: job["updated_at"])


def hit_while_editing(program: Program, number: signal.Signals) -> None:
    """Send a signal to a job that has made some edits, but not all."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for job in running(program):
            log = program.runs / (job["run_dir"] or "-") / "edits.jsonl"
            if log.exists() and 1 <= log.read_bytes().count(b"\n") < EDITS:
                os.kill(job["process"]["pid"], number)
                return
        time.sleep(0.05)
    raise TimeoutError("no job was seen in the middle of its edits")


def test_a_killed_process_hides_no_other_and_is_retried_where_it_stopped(unbroken: Program, cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path, cache=cache_dir)
    sweep = program.start("-m", *GRID, *PROCESSES)
    hit_while_editing(program, signal.SIGKILL)
    assert sweep.wait(timeout=240) == 1
    status = program.tool("status", str(tmp_path))
    assert "1 done, 1 failed" in status
    assert "_log.out" in status
    program.tool("retry", str(tmp_path))
    assert program.edits_logged() == 2 * EDITS
    assert program.heads() == unbroken.heads()
    assert program.scores() == pytest.approx(unbroken.scores(), abs=0, nan_ok=True)


def test_jobs_outlive_the_sweep_and_the_signal_before_a_time_limit(unbroken: Program, cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path, cache=cache_dir)
    sweep = program.start("-m", *GRID, *PROCESSES)
    hit_while_editing(program, signal.SIGUSR2)
    os.kill(sweep.pid, signal.SIGHUP)  # the terminal is gone
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    end = time.monotonic() + 240
    while "2 done" not in (status := program.tool("status", str(tmp_path))):
        assert time.monotonic() < end, status
        time.sleep(1)
    launches = [json.loads(path.read_text())["launches"] for path in (tmp_path / ".jobs").glob("*.json")]
    assert sorted(launches) == [1, 2]
    assert program.edits_logged() == 2 * EDITS
    assert program.heads() == unbroken.heads()
    assert program.scores() == pytest.approx(unbroken.scores(), abs=0, nan_ok=True)
