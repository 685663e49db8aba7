"""Thousands of cells, a thousand runs: what planning and looking tell stays whole (how fast they are is in BENCHMARKS.md)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from editeval.runner.results import ScoreStore
from editeval.sweep import records
from editeval.sweep.plan import Job
from editeval.sweep.records import DONE, JobRecord, PlannedJob, Process, SweepRecord
from editeval.sweep.show import show_status
from editeval.types import Evaluation, Measurement
from tests.sweep.commands import Program

RUNS, BENCHMARKS = 1000, ("mmlu", "gsm8k", "edit-quality")

pytestmark = pytest.mark.xdist_group("test_growth")  # they share what a fixture makes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand finished runs of three cells, in one sweep: 3,000 cells."""
    runs = tmp_path_factory.mktemp("many")
    template = runs / "template"
    measured = [Measurement(task=f"t{k}", metric="accuracy", protocol="likelihood", value=k / 7, n=9) for k in range(6)]
    for name in BENCHMARKS:
        ScoreStore(template).record(
            Evaluation(measurements=tuple(measured)), benchmark=name, benchmark_key="k", num_edits=0, state_digest="s", seconds=1.0
        )
    scores = (template / "scores.jsonl").read_bytes()
    config = {"model": {"name": "tiny"}, "method": {"name": "rome"}, "num_edits": 0, "benchmark": {name: {} for name in BENCHMARKS}}
    jobs = [Job(overrides=(f"seed={seed}", "num_edits=[0]"), rungs=(0,), benchmarks=BENCHMARKS) for seed in range(RUNS)]
    (template / "scores.jsonl").unlink()
    template.rmdir()
    (runs / records.JOBS).mkdir()
    for number, job in enumerate(jobs):  # plainly, without what makes a write survive a power cut: that is not what is timed
        folder = runs / f"tiny-rome-facts-{number:012d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"edit_key": "e", "model_fingerprint": "s", "config": config}))
        (folder / "edits.jsonl").write_text(json.dumps({"step": 1, "seconds": 0.5}) + "\n")
        (folder / "scores.jsonl").write_bytes(scores)
        record = JobRecord(
            job=job.id,
            overrides=job.overrides,
            code="c",
            state=DONE,
            process=Process.current(),
            started_at="",
            updated_at="",
            run_dir=folder.name,
        )
        (runs / records.JOBS / f"{job.id}.json").write_text(json.dumps(asdict(record)))
    planned = tuple(PlannedJob(job=job.id, overrides=job.overrides, rungs=job.rungs, benchmarks=job.benchmarks) for job in jobs)
    records.write_sweep(
        runs, SweepRecord(sweep=records.sweep_id(jobs), command=("launch.py", "-m"), folder=str(runs), made_at="", jobs=planned)
    )
    return runs


def test_the_status_of_a_thousand_runs_counts_every_cell(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = show_status(many, use_queue=False)
    assert {status.state for status in found} == {"done"}
    assert sum(len(status.measured) for status in found) == 3 * RUNS
    assert "1000 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "grid",
    [
        ("method=rome,none", "seed=range(0,30)", "num_edits=1,2,3,5,7,10,15,20,30,50", "benchmark=edit-quality,perplexity,quick,mmlu,mmlu"),
        ("method=rome,none", "seed=range(0,750)", "num_edits=1"),
    ],
    ids=["folded", "a trajectory each"],
)
def test_a_grid_of_thousands_of_cells_is_planned_whole(grid: tuple[str, ...], cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    command = [text for text in program.command("-m", *grid, "hydra.sweeper.plan_only=true") if not text.startswith("benchmark")]
    command += [text for text in grid if text.startswith("benchmark=")]
    output = program.run(command)
    assert "evaluations; in the store: 0" in output
    cells = int(output.split(" evaluations;")[0].split()[-1])
    assert cells >= 2500
