"""What disks and clocks do to a run: it fails in words or not at all, and the next start ends like an unbroken one."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.sweep.commands import Program

RUNGS = "num_edits=[1,4]"
DAY = 86_400

pytestmark = pytest.mark.xdist_group("test_disk")  # they share what a fixture makes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Program:
    program = Program(runs=tmp_path_factory.mktemp("unbroken"), cache=cache_dir)
    program.launch(RUNGS)
    return program


@pytest.fixture
def broken(unbroken: Program, cache_dir: Path, tmp_path: Path) -> Program:
    """The same run taken back to the middle: two of four edits, and the scores of the first rungs."""
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    shutil.copytree(unbroken.runs, program.runs)
    folder = run_of(program)
    entries = Program.journal(folder)
    assert len(entries) == 4
    segment = max((folder / "journal").iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data[: len(data) * 6 // 10])
    lines = (folder / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "scores.jsonl").write_bytes(b"".join(lines[: len(lines) * 2 // 3]) + lines[-1][:20])
    return program


def run_of(program: Program) -> Path:
    (folder,) = program.folders()
    return folder


def assert_same(program: Program, unbroken: Program) -> None:
    assert program.heads() == unbroken.heads()
    assert program.scores() == pytest.approx(unbroken.scores(), abs=0, nan_ok=True)


def test_a_torn_tail_of_journal_and_scores_is_continued_from(broken: Program, unbroken: Program) -> None:
    broken.launch(RUNGS)
    assert_same(broken, unbroken)


def test_files_from_a_machine_whose_clock_is_a_day_off_are_continued_from(broken: Program, unbroken: Program) -> None:
    for number, path in enumerate(sorted(broken.runs.rglob("*"))):
        moment = time.time() + (DAY if number % 2 else -DAY)
        os.utime(path, (moment, moment))
    broken.launch(RUNGS)
    assert_same(broken, unbroken)


def test_two_live_jobs_whose_clocks_are_a_day_apart_end_like_one(unbroken: Program, cache_dir: Path, tmp_path: Path) -> None:
    clock = "import time\nnow, now_ns = time.time, time.time_ns\n"
    clock += f"time.time = lambda: now() + {DAY}\ntime.time_ns = lambda: now_ns() + {DAY} * 10**9\n"
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(clock)
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    ahead = Program(runs=program.runs, cache=cache_dir, environment={"PYTHONPATH": f"{tmp_path / 'clock'}{os.pathsep}{REPOSITORY}"})
    assert int(ahead.run([sys.executable, "-c", "import time; print(int(time.time()))"])) > time.time() + DAY / 2
    jobs = [one.start(RUNGS) for one in (program, ahead, program)]
    assert [job.wait(timeout=400) for job in jobs] == [0, 0, 0]
    assert_same(program, unbroken)


def test_a_disk_that_is_full_fails_the_run_in_words_and_loses_nothing(cache_dir: Path, unbroken: Program, tmp_path: Path) -> None:
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    room = run_of(unbroken).joinpath("scores.jsonl").stat().st_size * 2 // 3 + 100  # the last rung's scores do not fit

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = subprocess.run(
        program.command(RUNGS), cwd=program.cwd, capture_output=True, text=True, timeout=300, check=False, preexec_fn=little_room
    )
    assert done.returncode == 1
    assert "cannot write results any more" in done.stderr
    assert "Traceback" not in done.stderr
    assert program.edits_logged() == 4
    program.launch(RUNGS)
    assert program.edits_logged() == 4
    assert_same(program, unbroken)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    program = Program(runs=tmp_path / "file" / "runs", cache=cache_dir)
    output = program.launch(RUNGS, status=1)
    assert "cannot write results to" in output
    assert "Traceback" not in output


def test_a_file_system_that_turns_read_only_fails_in_words_and_the_next_start_continues(broken: Program, unbroken: Program) -> None:
    command = " ".join(f"'{text}'" for text in broken.command(RUNGS))
    runs = broken.runs
    script = f"mount --bind {runs} {runs} && mount -o remount,ro,bind {runs} && {command}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no rights to make a folder read-only for one process alone")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], cwd=broken.cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "cannot write results to" in done.stderr + done.stdout
    broken.launch(RUNGS)
    assert_same(broken, unbroken)
