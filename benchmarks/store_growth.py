"""What a large sweep costs before and after it ran: planning, `status`, and a question over all scores.

    python -m benchmarks.store_growth

Plans a grid of 3,000 cells, then writes a folder of 1,000 finished runs (3,000 cells, 18,000 scores) and looks at it. Seconds are of wall
clock in fresh processes, imports included, best of a few. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from editeval.report.query import query
from tests.sweep.many import write_many

ROOT = Path(__file__).resolve().parents[1]
GRID = ("method=rome,none", "seed=range(0,30)", "num_edits=1,2,3,5,7,10,15,20,30", "benchmark=edit-quality,perplexity,quick,mmlu,gsm8k")


def timed(times: int, *command: str) -> float:
    """Return the shortest of some runs of a command of this program, in seconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name) / "runs"
        figures = {"plan_seconds": timed(times, "launch.py", "-m", *GRID, f"paths.runs={runs}", "hydra.sweeper.plan_only=true")}
        runs.mkdir(exist_ok=True)
        write_many(runs)
        figures["status_seconds"] = timed(times, "-m", "editeval", "status", str(runs), "--no-queue")
        folders = sorted(path.parent for path in runs.glob("*/manifest.json"))
        asked = []
        for _ in range(times):
            started = time.perf_counter(), time.process_time()
            query(folders, "SELECT benchmark, avg(value) FROM scores GROUP BY ALL")
            asked.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        figures["query_seconds"], figures["query_cpu_seconds"] = min(asked)
    print(json.dumps({name: round(seconds, 2) for name, seconds in figures.items()}))


if __name__ == "__main__":
    main()
