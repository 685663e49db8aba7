"""What each method gains and costs over a sequence of edits on SmolLM2: the table of BENCHMARKS.md.

    python benchmarks/edit_table.py --data DIR --methods rome r-rome memit alphaedit
    python benchmarks/edit_table.py model.device=cuda --data DIR --edits 50 --runs runs/table --dataset zsre --methods grace

Every row is one run of the product (what `launch.py` runs) with the method's settings for the model: rows of CounterFact or ZsRE one
after another, nothing restored (LocFT-BF: all of them as one edit). *Immediate* asks about each fact right after its own edit, *retained*
about all facts after the last, by probability (of ZsRE: tokens that are the first choice behind the ones before) and by free generation
(`editeval/benchmarks/edit_quality.py`). A run that was killed goes on where it stopped. Prints a table, and one JSON line. Seconds an edit
are the median's, by the clock and of the CPU in all threads; `ready` are the CPU's before the first edit (second moments, training), as far
as they are not in the cache already.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

from hydra import compose, initialize_config_dir

from benchmarks.command import with_overrides
from editeval.benchmarks.edit_quality import EditQuality
from editeval.experiment import run
from editeval.files import Cache, append_jsonl, read_jsonl
from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, EvaluationContext, RunState
from editeval.types import EditRequest, Score

REPOSITORY = Path(__file__).resolve().parents[1]
REGULARISERS = ("rect", "prune")  # over ROME's edits
METHODS = (
    *("none", "random", "rome", "r-rome", "memit", "pmet", "pmet-attention", "emmet", "alphaedit", *REGULARISERS, "nse", "ultraedit"),
    *("mend", "rledit", "kn", "grace", "wise", "serac", "ike", "ft-l", "ft-m", "lora", "locft-bf"),
)
VARIANTS: Mapping[str, tuple[str, ...]] = {  # rows of the table that are settings of another method
    "r-rome": ("method=rome", "method.key=consistent"),
    "pmet-attention": ("method=pmet", "method.edit=both"),
    "locft-bf": ("method=locft-bf", "batch_size={edits}", "num_edits=1"),
}
LIKELIHOODS = {"counterfact": ("p", "probability"), "zsre": ("tokens", "teacher_forced")}  # ZsRE has no old answer to be likelier than
IMMEDIATE_FILE = "immediate.jsonl"
MAX_NEW_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: numbers are named `metric.protocol`."""

    method: str
    edits: int
    immediate: Mapping[str, float]
    retained: Mapping[str, float]
    weight_norm_ratio: float
    seconds_per_edit: float
    cpu_seconds_per_edit: float  # its application too
    bytes_per_edit: float
    dataset: str
    seconds_ready: float  # of the CPU: before the first edit, and what that took beyond the median one


class Immediate(Callback):
    """Asks about the facts of each edit right after it, and keeps the answers beside the run."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._quality = EditQuality(max_new_tokens=MAX_NEW_TOKENS, fluency_tokens=1, fluency_facts=0)
        self._requests: tuple[EditRequest, ...] = ()
        self._known: set[int] = set()
        self._waiting_since = self._started = 0.0

    def on_run_start(self, state: RunState) -> None:
        self._waiting_since = time.process_time()
        self._known = {int(row["step"]) for row in read_jsonl(Path(state.run_dir) / IMMEDIATE_FILE)[0]}

    def on_edit_start(self, state: RunState, requests: Sequence[EditRequest]) -> None:
        self._requests = tuple(requests)
        self._started = time.process_time()

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        self._waiting_since = time.process_time()  # the unedited model's, at last, before the first edit is prepared

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        cost = {"cpu": time.process_time() - self._started, "before": self._started - self._waiting_since}
        if event.step not in self._known:
            context = EvaluationContext(num_edits=event.num_edits, edited=self._requests, planned=self._requests, seed=0, cache=self._cache)
            measured = self._quality.evaluate(model, context).measurements
            values = {f"{item.metric}.{item.protocol}": item.value for item in measured}
            append_jsonl(Path(state.run_dir) / IMMEDIATE_FILE, [{"step": event.step, "values": values, **cost}])
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every method and print its row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--dataset", choices=list(LIKELIHOODS), default="counterfact")
    parser.add_argument("--data", type=Path, required=True, help="a folder with counterfact/rome/test.jsonl and zsre/mend_edit/test.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", help="further settings, as on the command line of launch.py")
    options = with_overrides(parser, arguments)
    print(header(options.dataset), flush=True)
    rows = []
    for method in options.methods:
        where = {"edits": options.edits, "dataset": options.dataset, "data": options.data, "runs": options.runs}
        row = measure(method, **where, overrides=options.overrides)
        rows.append(row)
        print(line(row), flush=True)
    print(json.dumps([asdict(row) for row in rows]))
    return 0


def measure(method: str, *, edits: int, dataset: str, data: Path, runs: Path, overrides: Sequence[str]) -> Row:
    """Run one method and read its numbers from disk."""
    settings = [
        f"num_edits={edits}",
        *(setting.format(edits=edits) for setting in VARIANTS.get(method, (f"method={method}",))),
        f"dataset={dataset}",
        f"training={dataset}",
        f"paths.data={data.resolve()}",
        f"paths.runs={runs.resolve()}",
        "benchmark=[edit-quality]",
        f"benchmark.edit-quality.max_new_tokens={MAX_NEW_TOKENS}",
        "callback=silent",
        "logger=[csv]",
        *overrides,
    ]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("config", overrides=settings)
    result = run(config, Immediate(Cache(Path(config.paths.cache))))
    retained = {f"{score.metric}.{score.protocol}": score.value for score in result.scores if score.num_edits > 0}
    asked = {row["step"]: row for row in read_jsonl(result.run_dir / IMMEDIATE_FILE)[0]}.values()  # a step may stand there twice
    names = {name for row in asked for name in row["values"]}
    immediate = {name: fmean([row["values"][name] for row in asked if name in row["values"]]) for name in names}
    first = next((row for row in asked if row["step"] == 1), None)
    seconds = median([float(row["cpu"]) for row in asked]) if asked else 0.0
    log: list[dict[str, Any]] = read_jsonl(result.run_dir / "edits.jsonl")[0]
    journal = sum(file.stat().st_size for file in (result.run_dir / "journal").glob("*"))
    return Row(
        method=method,
        edits=edits,
        immediate=immediate,
        retained=retained,
        weight_norm_ratio=float(log[-1]["weight_norm_ratio"]) if log else 1.0,
        seconds_per_edit=median([float(row["seconds"]) for row in log]) if log else 0.0,
        cpu_seconds_per_edit=seconds,
        bytes_per_edit=journal / edits,
        dataset=dataset,
        seconds_ready=max(0.0, float(first["before"]) + float(first["cpu"]) - seconds) if first else 0.0,
    )


def columns(dataset: str) -> dict[str, str]:
    """Return the heads of the columns of answers, each with the name of its number."""
    head, protocol = LIKELIHOODS[dataset]
    found: dict[str, str] = {}
    for metric in ("efficacy", "generalization", "locality"):
        likely = "neighborhood_success" if (metric, protocol) == ("locality", "probability") else metric
        found |= {f"{metric}, {head}": f"{likely}.{protocol}", f"{metric}, written": f"{metric}.generation"}
    return found


def header(dataset: str) -> str:
    """Return the table's head; each cell is immediate > retained."""
    names = ["method", *columns(dataset), "norm", "s/edit", "CPU s/edit", "kB/edit", "ready, CPU s"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def line(row: Row) -> str:
    """Return a method's line."""
    cells = [f"{number(row.immediate, name)} > {number(row.retained, name)}" for name in columns(row.dataset).values()]
    cost = [
        f"{row.weight_norm_ratio:.2f}",
        f"{row.seconds_per_edit:.1f}",
        f"{row.cpu_seconds_per_edit:.2f}",
        f"{row.bytes_per_edit / 1000:.1f}",
        f"{row.seconds_ready:.0f}",
    ]
    return f"| {' | '.join([row.method, *cells, *cost])} |"


def number(values: Mapping[str, float], name: str) -> str:
    """Return a number with two digits, or a dash where there is none."""
    return f"{values[name]:.2f}" if name in values else "-"


if __name__ == "__main__":
    sys.exit(main())
