"""What a grid costs as trajectories, against one job a cell: `python -m benchmarks.sweep_cost`.

The published grid of arXiv 2410.18785 for one model is methods x counts x benchmarks. The usual way (its own code, and EasyEdit's) starts
from the unedited model in every cell. Here a cell is a rung of a trajectory. The number of edits and of evaluations is counted from the
files that the runs leave, not from the plan, and the time of both ways is measured on the same tiny model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from editeval.files import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
PAPER_METHODS, PAPER_RUNGS, PAPER_BENCHMARKS = 7, (1, 5, 10, 20, 50, 100, 500, 1000), 7


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Edits computed, cells measured, processes started, seconds of wall clock."""

    edits: int
    evaluations: int
    launches: int
    seconds: float


def count(runs: Path) -> tuple[int, int]:
    """Return the edits that were computed and the cells that were measured in a folder of runs."""
    edits = evaluations = 0
    for folder in (path.parent for path in runs.glob("*/manifest.json")):
        edits += sum(not row["replayed"] for row in read_jsonl(folder / "edits.jsonl")[0])
        evaluations += len({(row["num_edits"], row["benchmark"], row["benchmark_key"]) for row in read_jsonl(folder / "scores.jsonl")[0]})
    return edits, evaluations


def launch(runs: Path, cache: Path, *arguments: str) -> None:
    """Run `launch.py` with its output thrown away; a failure shows it."""
    common = ["debug=tiny", "callback=silent", "logger=csv", f"paths.runs={runs}", f"paths.cache={cache}"]
    flags = [text for text in arguments if text.startswith("-")]
    command = [sys.executable, "launch.py", *flags, *common, *(text for text in arguments if not text.startswith("-"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def as_trajectories(folder: Path, methods: Sequence[str], rungs: Sequence[int], benchmarks: Sequence[str]) -> Cost:
    """One `-m` for the whole grid."""
    started = time.perf_counter()
    grid = (f"method={','.join(methods)}", f"num_edits={','.join(map(str, rungs))}", f"benchmark={','.join(benchmarks)}")
    launch(folder / "runs", folder / "cache", "-m", *grid)
    edits, evaluations = count(folder / "runs")
    return Cost(edits=edits, evaluations=evaluations, launches=1, seconds=time.perf_counter() - started)


def cell_by_cell(folder: Path, methods: Sequence[str], rungs: Sequence[int], benchmarks: Sequence[str]) -> Cost:
    """A fresh process and a fresh folder for every cell; only models and key statistics are shared."""
    started = time.perf_counter()
    edits = evaluations = launches = 0
    for method, rung, benchmark in itertools.product(methods, rungs, benchmarks):
        launches += 1
        runs = folder / f"cell-{launches}"
        launch(runs, folder / "cache", f"method={method}", f"num_edits={rung}", f"benchmark=[{benchmark}]")
        more = count(runs)
        edits, evaluations = edits + more[0], evaluations + more[1]
    return Cost(edits=edits, evaluations=evaluations, launches=launches, seconds=time.perf_counter() - started)


def main() -> None:
    """Measure both ways and print them, with the published grid by the same arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="rome,none")
    parser.add_argument("--rungs", default="1,2,4")
    parser.add_argument("--benchmarks", default="edit-quality,perplexity")
    parser.add_argument("--only-trajectories", action="store_true", help="leave out the slow way")
    options = parser.parse_args()
    methods, benchmarks = options.methods.split(","), options.benchmarks.split(",")
    rungs = [int(rung) for rung in options.rungs.split(",")]
    with tempfile.TemporaryDirectory() as name:
        ours = as_trajectories(Path(name) / "trajectories", methods, rungs, benchmarks)
        print(f"as trajectories: {ours}", flush=True)
        figures: dict[str, object] = {"as trajectories": asdict(ours)}
        assert ours.edits == len(methods) * max(rungs), "an edit was computed twice, or not at all"
        assert ours.evaluations == len(methods) * (len(rungs) + 1) * len(benchmarks), "a score was measured twice, or not at all"
        if not options.only_trajectories:
            cells = cell_by_cell(Path(name) / "cells", methods, rungs, benchmarks)
            print(f"cell by cell:    {cells}")
            figures["cell by cell"] = asdict(cells)
    paper = {
        "edits as trajectories": PAPER_METHODS * max(PAPER_RUNGS),
        "edits cell by cell": PAPER_METHODS * PAPER_BENCHMARKS * sum(PAPER_RUNGS),
        "edits with one process a rung": PAPER_METHODS * sum(PAPER_RUNGS),
    }
    print(json.dumps({**figures, "the published grid for one model": paper}))


if __name__ == "__main__":
    main()
