"""Mirrors of a run's scores for people and spreadsheets: the console, a CSV file. They can be made again; `scores.jsonl` is the truth."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from editeval.files import write_atomic
from editeval.interfaces import Callback, RunState
from editeval.runner.table import ScoreTable, headline, score_table
from editeval.types import Score

SCORES_CSV = "scores.csv"
LOG_WIDTH = 140  # characters a line where the width of the output is not known (a file, a cluster's log)
RUNG_WIDTH = 12
COLUMN_WIDTH = 10  # smallest width of a column of numbers


# -- console ---------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ConsoleLogger(Callback):
    """Prints the final table: one part a benchmark, rungs down, metrics across."""

    console: Console | None = None

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Print the table and where everything is."""
        console = self.console or Console()
        if not console.is_terminal and self.console is None:
            console = Console(width=LOG_WIDTH)
        whole = headline(score_table(scores))
        for label in whole.benchmarks():
            for part in _parts(whole.only(column for column in whole.columns if column.benchmark_label == label), console.width):
                console.print(_title(part, label), style="italic", highlight=False, markup=False)
                console.print(_rich_table(part))
        if any(whole.at_chance(column) for column in whole.columns):
            console.print("* the unedited model is not above chance here, so this number cannot show damage", markup=False)
        console.print(f"results in {state.run_dir}", markup=False, highlight=False, soft_wrap=True)


def _parts(table: ScoreTable, width: int) -> Iterator[ScoreTable]:
    """Yield pieces of a table that fit a width, broken between protocols where one alone is not too wide."""
    fitting = max(1, (width - RUNG_WIDTH) // (COLUMN_WIDTH + 3))
    protocols = dict.fromkeys(column.protocol for column in table.columns)
    groups = [table.columns] if len(table.columns) <= fitting else [tuple(c for c in table.columns if c.protocol == p) for p in protocols]
    for group in groups:
        for start in range(0, len(group), fitting):
            yield table.only(group[start : start + fitting])


def _title(table: ScoreTable, label: str) -> str:
    """Return what all columns of a table share."""
    tasks, protocols = {column.task_label for column in table.columns}, {column.protocol for column in table.columns}
    shared = [label, *(tasks if len(tasks) == 1 else ()), *(protocols if len(protocols) == 1 else ())]
    return " · ".join(filter(None, shared)).replace("_", " ")


def _rich_table(table: ScoreTable) -> Table:
    """Return a table whose heads say what its columns do not share."""
    tasks, protocols = {column.task_label for column in table.columns}, {column.protocol for column in table.columns}
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for column in table.columns:
        lines = [column.task_label if len(tasks) > 1 else "", column.metric, column.protocol if len(protocols) > 1 else ""]
        mark = "*" if table.at_chance(column) else ""
        shown.add_column("\n".join(filter(None, lines)).replace("_", " ") + mark, justify="right", min_width=COLUMN_WIDTH)
    for name, *values in table.rows():
        shown.add_row(name, *values, style="dim" if name == "chance" else None)
    return shown


# -- CSV -------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CsvLogger(Callback):
    """Keeps `scores.csv` in the run's folder: one row a score, every field of it."""

    _scores: dict[tuple[int, str], tuple[Score, ...]] = field(default_factory=dict, init=False, repr=False)

    def on_run_start(self, state: RunState) -> None:
        """Forget the run before."""
        self._scores = {}

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        """Write everything measured so far."""
        self._scores[(state.num_edits, benchmark)] = tuple(scores)
        write_atomic(Path(state.run_dir) / SCORES_CSV, scores_csv([score for cell in self._scores.values() for score in cell]))

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Write all scores."""
        write_atomic(Path(state.run_dir) / SCORES_CSV, scores_csv(scores))


def scores_csv(scores: Sequence[Score]) -> str:
    """Return scores as CSV: a header, one row a score; floats with every digit, None as the empty text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(item.name for item in fields(Score)), "chance_corrected"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(score), "chance_corrected": score.chance_corrected} for score in scores)
    return text.getvalue()
