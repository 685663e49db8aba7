"""A folder as it is after a large sweep, written without running it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from editeval.runner.results import ScoreStore
from editeval.sweep import records
from editeval.sweep.plan import Job
from editeval.sweep.records import DONE, JobRecord, PlannedJob, Process, SweepRecord
from editeval.types import Evaluation, Measurement

RUNS, BENCHMARKS, METRICS = 1000, ("mmlu", "gsm8k", "edit-quality"), 6


def write_many(runs: Path) -> None:
    """Write a thousand finished runs of three cells, in one sweep: 3,000 cells."""
    template = runs / "template"
    measured = [Measurement(task=f"t{k}", metric="accuracy", protocol="likelihood", value=k / 7, n=9) for k in range(METRICS)]
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
