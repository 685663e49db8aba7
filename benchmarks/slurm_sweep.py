"""A real sweep of SmolLM2 through a real Slurm: 2 methods x 2 data sets x 3 rungs, its `status`, and its W&B runs read back.

    python -m benchmarks.slurm_sweep --data DIR --rungs 1,2,4

Needs the programs of Debian's `slurm-wlm` and root; starts a cluster of one node of its own and leaves nothing behind. `--data` is a folder
with CounterFact's rows (see README, "Data"). Every number that W&B's offline files hold must be that of `scores.jsonl`, and none may be
missing; ends with status 1 otherwise, and with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from editeval.runner.results import ScoreStore
from tests.cluster.slurm import Slurm, why_not
from tests.runner.offline import history, offline_records

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "method=rome,grace",
    "dataset=facts,counterfact",
    "benchmark=[edit-quality,perplexity]",
    "benchmark.edit-quality.fluency_facts=0",
    "logger=[csv,wandb]",
    "logger.wandb.mode=offline",
    "callback=silent",
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.setup=['export OMP_NUM_THREADS=1']",
)


def call(*command: str, environment: dict[str, str]) -> str:
    """Run a command of this program and return what it printed; a failure shows it and ends this one."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def differences(run: Path) -> tuple[int, int]:
    """Return how many scores a run has, and how many of them W&B's files lack or hold otherwise."""
    logged = history(offline_records(run))
    scores = ScoreStore(run).scores()
    return len(scores), sum(logged.get((score.num_edits, score.name)) != score.value for score in scores)


def main() -> int:
    """Run the sweep, wait for the queue to be empty, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rungs", default="1,2,4")
    parser.add_argument("--minutes", type=float, default=60, help="how long the queue may take")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as name:
        runs, slurm = Path(name) / "runs", Slurm(Path(name) / "slurm")
        started = time.perf_counter()
        try:
            slurm.start()
            paths = (f"paths.data={options.data.resolve()}", f"paths.runs={runs}", f"num_edits={options.rungs}")
            print(call("launch.py", "-m", *SETTINGS, *paths, environment=slurm.environment), flush=True)
            slurm.wait(lambda: not slurm.queue(), "the queue to be empty", seconds=60 * options.minutes)
            status = call("-m", "editeval", "status", str(runs), environment=slurm.environment)
        finally:
            slurm.stop()
        print(status)
        folders = sorted(path.parent for path in runs.glob("*/manifest.json"))
        compared = {folder.name: differences(folder) for folder in folders}
        figures = {
            "runs": len(folders),
            "done": "4 done" in status,
            "scores": sum(scores for scores, _ in compared.values()),
            "not_in_wandb": sum(missing for _, missing in compared.values()),
            "seconds": round(time.perf_counter() - started),
        }
        print(json.dumps(figures))
        return 0 if figures["done"] and figures["runs"] == 4 and figures["not_in_wandb"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
