"""What a grid costs as trajectories, against one job a cell: `python -m benchmarks.sweep_cost`.

    python -m benchmarks.sweep_cost --paper --data DIR --sample 6    # the published grid for one model, on a tiny one

The published grid of arXiv 2410.18785 for one model is methods x counts x benchmarks. The usual way (its own code, and EasyEdit's) starts
from the unedited model in every cell. Here a cell is a rung of a trajectory. Edits and evaluations are counted from the files that the runs
leave, not from the plan: a cell that was measured twice would leave two durations. Of a large grid the usual way is run for a sample of
its cells; its whole time is then what a cell of the sample takes beside its edits, for each cell, and the seconds of each method's edits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from editeval.files import read_jsonl
from editeval.runner.run_files import read_manifest

ROOT = Path(__file__).resolve().parents[1]
PAPER_METHODS = ("rome", "memit", "pmet", "mend", "kn", "grace", "serac")
PAPER_RUNGS = (1, 5, 10, 20, 50, 100, 500, 1000)
# Items of each of the paper's benchmarks (of each of MMLU's 57 subjects and of BBH's 27 tasks), few: cells are counted, not scores.
PAPER_ITEMS = {"mmlu-generative": 1, "bbh": 1, "gsm8k": 4, "commonsense_qa-generative": 4, "triviaqa": 4, "truthfulqa": 4, "toxigen": 4}
LIKELIHOOD = ("truthfulqa", "toxigen")
SAMPLED_RUNGS = 100  # cells of more edits are predicted only


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured; `settings` are overrides of every launch, those of a benchmark only where it is measured."""

    methods: tuple[str, ...]
    rungs: tuple[int, ...]
    benchmarks: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def cells(self) -> list[tuple[str, int, str]]:
        """(method, number of edits, benchmark) of every cell; the unedited model is none."""
        return list(itertools.product(self.methods, self.rungs, self.benchmarks))

    def settings_of(self, benchmarks: Sequence[str]) -> list[str]:
        """Return the overrides of a launch that measures these benchmarks."""
        left_out = tuple(f"benchmark.{name}." for name in self.benchmarks if name not in benchmarks)
        return [text for text in self.settings if not text.startswith(left_out or "-")]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Edits computed, cells measured, measurements of the unedited model, processes started, seconds of wall clock."""

    edits: int
    evaluations: int
    unedited: int
    launches: int
    seconds: float


def paper_grid(data: Path) -> Grid:
    """Return the published grid for one model with few items, on a random model that reads 1,024 tokens."""
    settings = ["dataset=counterfact", "dataset.subset=easyedit", "dataset.split=edit", "training=counterfact", f"paths.data={data}"]
    for name, items in PAPER_ITEMS.items():
        settings += [f"benchmark.{name}.limit={items}", f"benchmark.{name}.on_long_context=truncate"]
        settings += [] if name in LIKELIHOOD else [f"benchmark.{name}.max_new_tokens=4"]
    return Grid(methods=PAPER_METHODS, rungs=PAPER_RUNGS, benchmarks=tuple(PAPER_ITEMS), settings=tuple(settings))


def count(runs: Path) -> tuple[int, int, int]:
    """Return the edits that were computed, the cells and the cells of the unedited model that were measured in a folder of runs."""
    edits, cells = 0, set()
    for folder in (path.parent for path in runs.glob("*/manifest.json")):
        edits += sum(not row["replayed"] for row in read_jsonl(folder / "edits.jsonl")[0])
        for row in read_jsonl(folder / "scores.jsonl")[0]:
            # the unedited model's scores are shared between runs, with the seconds that they took where they were measured
            of = folder.name if row["num_edits"] else ""
            cells.add((of, row["num_edits"], row["benchmark"], row["benchmark_key"], row["state_digest"], row["seconds"]))
    return edits, sum(bool(of) for of, *_ in cells), sum(not of for of, *_ in cells)


def edit_seconds(runs: Path) -> dict[str, float]:
    """Return the mean seconds of an edit by method."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for folder in (path.parent for path in runs.glob("*/manifest.json")):
        found[read_manifest(folder)["config"]["method"]["name"]] += [row["seconds"] for row in read_jsonl(folder / "edits.jsonl")[0]]
    return {method: mean(seconds) for method, seconds in found.items()}


def launch(runs: Path, cache: Path, *arguments: str) -> float:
    """Run `launch.py` with its output thrown away and return its seconds; a failure shows the output."""
    common = ["debug=tiny", "callback=silent", "logger=csv", f"paths.runs={runs}", f"paths.cache={cache}"]
    flags = [text for text in arguments if text.startswith("-")]
    command = [sys.executable, "launch.py", *flags, *common, *(text for text in arguments if not text.startswith("-"))]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - started


def as_trajectories(folder: Path, grid: Grid) -> Cost:
    """One `-m` for the whole grid."""
    axes = (f"method={','.join(grid.methods)}", f"num_edits={','.join(map(str, grid.rungs))}", f"benchmark=[{','.join(grid.benchmarks)}]")
    seconds = launch(folder / "runs", folder / "cache", "-m", *axes, *grid.settings)
    edits, evaluations, unedited = count(folder / "runs")
    assert edits == len(grid.methods) * max(grid.rungs), f"{edits}: an edit was computed twice, or not at all"
    assert evaluations == len(grid.cells), f"{evaluations}: a score was measured twice, or not at all"
    assert unedited == len(grid.benchmarks), f"{unedited}: the unedited model was measured twice, or not at all"
    return Cost(edits=edits, evaluations=evaluations, unedited=unedited, launches=1, seconds=seconds)


def cell_by_cell(folder: Path, grid: Grid, cells: Sequence[tuple[str, int, str]]) -> Cost:
    """A fresh process and a fresh folder for each of these cells; only models and what methods prepare are shared."""
    seconds, counted = 0.0, [(0, 0, 0)]
    for number, (method, rung, benchmark) in enumerate(cells):
        runs = folder / f"cell-{number}"
        own = (f"method={method}", f"num_edits={rung}", f"benchmark=[{benchmark}]")
        seconds += launch(runs, folder / "cache", *own, *grid.settings_of([benchmark]))
        counted.append(count(runs))
        assert counted[-1][:2] == (rung, 1), f"{method}, {rung} edits, {benchmark}: {counted[-1]}"
    edits, evaluations, unedited = map(sum, zip(*counted, strict=True))
    return Cost(edits=edits, evaluations=evaluations, unedited=unedited, launches=len(cells), seconds=seconds)


def predicted(grid: Grid, sample: Sequence[tuple[str, int, str]], measured: Cost, per_edit: dict[str, float]) -> dict[str, Any]:
    """Return what all cells would take one by one, from a sample of them."""
    beside = (measured.seconds - sum(rung * per_edit[method] for method, rung, _ in sample)) / len(sample)
    return {
        "edits": sum(rung for _, rung, _ in grid.cells),
        "evaluations": len(grid.cells),
        "launches": len(grid.cells),
        "seconds": len(grid.cells) * beside + sum(rung * per_edit[method] for method, rung, _ in grid.cells),
    }


def main() -> None:
    """Measure both ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="rome,none")
    parser.add_argument("--rungs", default="1,2,4")
    parser.add_argument("--benchmarks", default="edit-quality,perplexity")
    parser.add_argument("--paper", action="store_true", help="the published grid for one model instead; needs --data")
    parser.add_argument("--data", type=Path, help="paths.data, with the rows of the paper's benchmarks")
    parser.add_argument("--sample", type=int, help="how many cells to run one by one; all by default, 0 for none")
    parser.add_argument("--folder", type=Path, help="keep the runs there; by default they are removed")
    options = parser.parse_args()
    if options.paper and options.data is None:
        parser.error("--paper needs --data")
    small = (tuple(options.methods.split(",")), tuple(map(int, options.rungs.split(","))), tuple(options.benchmarks.split(",")))
    grid = paper_grid(options.data) if options.paper else Grid(methods=small[0], rungs=small[1], benchmarks=small[2])
    short = [cell for cell in grid.cells if cell[1] <= SAMPLED_RUNGS]
    sample = grid.cells if options.sample is None else random.Random(0).sample(short, options.sample)
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name)).absolute()
        ours = as_trajectories(folder / "trajectories", grid)
        print(f"as trajectories: {ours}", flush=True)
        per_edit = edit_seconds(folder / "trajectories" / "runs")
        figures: dict[str, Any] = {"as trajectories": asdict(ours), "seconds an edit": per_edit}
        if sample:
            cells = cell_by_cell(folder / "cells", grid, sample)
            figures |= {"cell by cell, measured": asdict(cells), "cell by cell, all": predicted(grid, sample, cells, per_edit)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
