"""Published numbers of arXiv 2410.18785, with what is doubtful about each: drawn beside ours where the same cell is shown, never mixed.

The numbers in `published/` were read from the tables of the paper's first version; `doubt` says where the print, or the code
behind it, is in question. A published curve is shown where model, method, benchmark and way of scoring are the same.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from editeval.runner.table import Column

FOLDER = Path(__file__).with_name("published")
SOURCE = "arXiv 2410.18785v1"
DATASET = "counterfact"
GENERATED = ("mmlu", "gsm8k", "bbh", "commonsense_qa")  # Table 6: these are decoded and parsed, the other two are likelihoods
LIKELIHOODS = {"truthfulqa": ("truthfulqa_mc1", "acc"), "toxigen": ("toxigen", "acc")}  # task and metric: .4284 is no balanced accuracy


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One printed number."""

    table: str
    model: str
    method: str
    num_edits: int
    benchmark: str
    value: float
    doubt: str = ""

    @property
    def protocol(self) -> str:
        """How it was scored."""
        return "generative" if self.benchmark in GENERATED else "likelihood"


@cache
def published_scores() -> tuple[PublishedRow, ...]:
    """Return Tables 1 to 5: accuracy or exact match."""
    with (FOLDER / "scores.csv").open(newline="") as file:
        return tuple(
            PublishedRow(
                table=row["table"],
                model=row["model"],
                method=row["method"],
                num_edits=int(row["num_edits"]),
                benchmark=row["benchmark"],
                value=float(row["value"]),
                doubt=row["doubt"],
            )
            for row in csv.DictReader(file)
        )


@cache
def _by_cell() -> Mapping[tuple[str, str, str], Sequence[PublishedRow]]:
    """Return the rows of Tables 1 to 5 by (model, benchmark, protocol)."""
    found: dict[tuple[str, str, str], list[PublishedRow]] = {}
    for row in published_scores():
        found.setdefault((row.model, row.benchmark, row.protocol), []).append(row)
    return found


@cache
def published_seconds() -> Mapping[tuple[str, str], float]:
    """Return Table 8, by (model, method): seconds an edit over 100 edits (one of eight RTX 4090)."""
    with (FOLDER / "seconds.csv").open(newline="") as file:
        return {(row["model"], row["method"]): float(row["seconds"]) / 100 for row in csv.DictReader(file) if row["num_edits"] == "100"}


@cache
def published_evaluating() -> Mapping[tuple[str, str], tuple[float, float]]:
    """Return Table 7, by (model, benchmark): what scoring took with vLLM and without, in a unit that the print does not name."""
    with (FOLDER / "evaluating.csv").open(newline="") as file:
        return {(row["model"], row["benchmark"]): (float(row["with_vllm"]), float(row["without_vllm"])) for row in csv.DictReader(file)}


def published_curve(model: str, method: str, dataset: str, column: Column) -> tuple[PublishedRow, ...]:
    """Return the printed rows of one curve by number of edits, the unedited model's first; empty where the cell was not published."""
    name = column.benchmark.replace("-", "_").removesuffix("_generative")
    if dataset != DATASET or LIKELIHOODS.get(name, (column.task, column.metric)) != (column.task, column.metric):
        return ()
    mine = _by_cell().get((model, name, column.protocol), ())
    edited = sorted((row for row in mine if row.method == method), key=lambda row: row.num_edits)
    return (*(row for row in mine if row.method == "none"), *edited) if edited else ()
