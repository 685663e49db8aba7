"""`python launch.py -m` with the trajectory sweeper, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from editeval.sweep.show import only_override
from tests.sweep.commands import Program

GRID = ("method=rome,none", "num_edits=1,3")

pytestmark = pytest.mark.xdist_group("test_sweep")  # they share what a fixture makes


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> tuple[Program, str]:
    """Two methods, two rungs, two benchmarks, folded; and what was printed."""
    program = Program(runs=tmp_path_factory.mktemp("swept"), cache=cache_dir)
    return program, program.launch("-m", *GRID)


def records(program: Program) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((program.runs / ".jobs").glob("*.json"))]


def test_the_plan_is_shown_before_and_the_outcome_after(swept: tuple[Program, str]) -> None:
    _, output = swept
    plan, outcome = output.index("2 jobs, 6 edits, 12 evaluations"), output.index("2 done")
    assert plan < outcome


def test_each_trajectory_was_edited_once_and_each_score_measured_once(swept: tuple[Program, str]) -> None:
    program, _ = swept
    assert len(program.folders()) == 2
    assert program.edits_logged() == 6
    cells = [key[:4] for key in program.scores()]
    assert len({(folder, rung, name) for folder, rung, name, _ in cells}) == 12


def test_the_plain_sweeper_gives_identical_scores(swept: tuple[Program, str], cache_dir: Path, tmp_path: Path) -> None:
    plain = Program(runs=tmp_path, cache=cache_dir)
    plain.launch("-m", *GRID, "hydra/sweeper=basic")
    assert (plain.runs / ".sweeps" / "multirun.yaml").exists()
    assert not (plain.cwd / "multirun.yaml").exists(), "Hydra's own file lay in the folder that was worked in"
    folded, every = swept[0].scores(), plain.scores()
    assert plain.heads() == swept[0].heads()
    assert {key: every[key] for key in folded} == pytest.approx(folded, abs=0, nan_ok=True)
    extra = {key for key in every if key not in folded}
    assert {key[1:3] for key in extra} == {(0, "edit-quality")}  # the job with one rung asks the unedited model about its one fact


def test_evaluations_split_over_jobs_give_identical_scores_without_editing_twice(
    swept: tuple[Program, str], cache_dir: Path, tmp_path: Path
) -> None:
    split = Program(runs=tmp_path, cache=cache_dir)
    output = split.launch("-m", "num_edits=1,3", "hydra.sweeper.max_cells_per_job=3")
    assert "2 jobs, 3 edits, 6 evaluations" in output
    assert split.edits_logged() == 3
    rome = {key: value for key, value in swept[0].scores().items() if "-rome-" in str(key[0])}
    assert split.scores() == pytest.approx(rome, abs=0, nan_ok=True)


def test_a_plan_alone_launches_and_writes_nothing(cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    output = program.launch("-m", *GRID, "hydra.sweeper.plan_only=true")
    assert "to launch: 2 jobs" in output
    assert not program.runs.exists()


def test_the_same_sweep_again_finds_everything_in_the_store(swept: tuple[Program, str]) -> None:
    program, _ = swept
    before = {path: path.read_bytes() for path in program.runs.rglob("*.jsonl")}
    output = program.launch("-m", *GRID)
    assert "in the store: 6 edits, 12 evaluations; to launch: 0 jobs" in output
    assert {path: path.read_bytes() for path in program.runs.rglob("*.jsonl")} == before


def test_one_failed_job_hides_no_other_and_a_retry_starts_it_alone(cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path, cache=cache_dir)
    output = program.launch("-m", "method.layer=99,1", "num_edits=1", status=1)
    assert "1 done, 1 failed" in output
    assert "python -m editeval retry" in output
    assert output.count("layer 99 not in 0..3") >= 2  # where it happens, and at the end
    status = program.tool("status", str(tmp_path))
    assert "layer 99 not in 0..3" in status
    assert {(record["state"], record["launches"]) for record in records(program)} == {("done", 1), ("failed", 1)}
    again = program.tool("retry", str(tmp_path), status=1)
    assert "starting 1 again" in again
    assert {(record["state"], record["launches"]) for record in records(program)} == {("done", 1), ("failed", 2)}


def test_a_job_that_was_killed_is_reported_as_failed_and_retried_where_it_stopped(
    swept: tuple[Program, str], cache_dir: Path, tmp_path: Path
) -> None:
    program = Program(runs=tmp_path, cache=cache_dir)
    process = program.start("-m", *GRID)
    deadline = time.monotonic() + 120
    while not any(folder.joinpath("edits.jsonl").exists() for folder in program.folders()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    status = program.tool("status", str(tmp_path))
    assert "1 failed" in status
    assert "its process is gone" in status
    assert "1 missing" in status
    edits = program.edits_logged()
    assert edits > 0
    program.tool("retry", str(tmp_path))
    assert program.heads() == swept[0].heads()
    assert program.scores() == pytest.approx(swept[0].scores(), abs=0, nan_ok=True)
    assert program.edits_logged() == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("num_edits=1,ten",), "'ten' is no number of edits"),
        (("method=rome,romee",), "romee"),
        (("hydra.sweeper.max_cells_per_job=0",), "max_cells_per_job=0"),
        (("hydra.sweeper.only=[abc]",), "abc"),
        (("method.layr=1,2",), "layr"),
        (("benchmark=edit-quality,mmlu", "benchmark.mmlu.limit=5"), "write benchmark=[mmlu,...]"),
    ],
)
def test_a_grid_that_cannot_work_is_refused_before_anything_is_launched(
    arguments: tuple[str, ...], expected: str, cache_dir: Path, tmp_path: Path
) -> None:
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    output = program.launch("-m", *arguments, status=1)
    assert expected in output
    assert "Traceback" not in output
    assert not program.runs.exists()


def test_a_machine_without_slurm_is_said_and_the_sweep_can_still_be_started(cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path / "runs", cache=cache_dir, environment={"PATH": str(tmp_path)})
    output = program.launch("-m", *GRID, "hydra/launcher=slurm", status=1)
    assert "hydra/launcher=processes does without" in output
    assert "Traceback" not in output
    assert "2 missing" in program.tool("status", str(program.runs))


def test_a_job_whose_name_looks_like_a_number_is_retried_by_its_name() -> None:
    names = ["123456789012", "1234e5678901", "a0b1c2d3e4f5"]
    override = OverridesParser.create().parse_override(only_override(names))
    assert override.value() == names
