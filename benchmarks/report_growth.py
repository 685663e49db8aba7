"""What the report over many runs costs: `python -m benchmarks.report_growth`.

Writes 200 finished runs (5 models, 8 methods, 5 orders of edits; 5 rungs of edit quality, of 7 benchmarks of 100 items each and of
perplexity) and makes their page and figures. The target is under 30 s for all, under 10 MB for the page: missed, it ends with status 1.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from editeval.report.study_build import write_study
from tests.report.synthetic import Planted, PlantedRun, falls_at, keeps, write_run

MODELS = ("llama2-7b", "llama2-7b-chat", "mistral-7b", "mistral-7b-instruct", "gpt2-xl")
METHODS = {"rome": 10, "memit": 100, "pmet": 80, "mend": 5, "kn": 3, "grace": 10**6, "serac": 10**6, "none": 10**9}  # half is lost at
BENCHMARKS = ("mmlu", "bbh", "gsm8k", "commonsense_qa", "triviaqa", "truthfulqa", "toxigen")
GOAL_SECONDS, GOAL_MEGABYTES = 30, 10  # of 200 runs: CPU time, and the page itself
WRITTEN = ("bbh", "gsm8k", "triviaqa")


def write_runs(root: Path, *, orders: int, rungs: Sequence[int]) -> list[Path]:
    """Write the runs and return their folders."""
    folders = []
    for model, (method, edits), seed in itertools.product(MODELS, METHODS.items(), range(orders)):
        benchmarks = tuple(
            Planted(
                name=name,
                kept=falls_at(edits),
                n=100,
                chance=0 if name in WRITTEN else 0.25,
                base=0.6,
                generated=name in WRITTEN,
                question_words=90,
            )
            for name in BENCHMARKS
        )
        efficacy = keeps(0.0 if method == "none" else 0.9)
        folders.append(
            write_run(root, PlantedRun(model=model, method=method, seed=seed, rungs=rungs, benchmarks=benchmarks, efficacy=efficacy))
        )
    return folders


def main() -> None:
    """Write, report, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--rungs", default="1,5,10,50,100")
    parser.add_argument("--profile", type=int, default=0, help="print so many of the functions in which the time is spent")
    parser.add_argument("--to", type=Path, help="keep the report there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = write_runs(Path(name) / "runs", orders=options.orders, rungs=tuple(map(int, options.rungs.split(","))))
        to = options.to or Path(name) / "report"
        profile = cProfile.Profile()
        started = time.perf_counter(), time.process_time()
        if options.profile:
            profile.enable()
        files = write_study(folders, to)
        profile.disable()
        seconds = {"wall_seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)
        figures = {
            "runs": len(folders),
            **{key: round(value, 1) for key, value in seconds.items()},
            "page_megabytes": round(files.html.stat().st_size / 1e6, 2),
            "figures_megabytes": round(sum(path.stat().st_size for path in files.figures.iterdir()) / 1e6, 2),
        }
    print(json.dumps(figures))
    within = figures["cpu_seconds"] < GOAL_SECONDS and figures["page_megabytes"] < GOAL_MEGABYTES
    sys.exit(None if within else f"200 runs should take less than {GOAL_SECONDS} CPU seconds, and the page less than {GOAL_MEGABYTES} MB")


if __name__ == "__main__":
    main()
