"""One table of scores for everybody who shows one: rungs down, metrics across, unedited and chance rows apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from editeval.types import Score

MISSING = "–"
MANY_TASKS = 8  # a benchmark with more tasks than this shows only the one that bears its name (the 57 subjects of MMLU)
PROTOCOLS_FIRST = ("generation", "likelihood", "cloze")  # what stands for a benchmark that has several; else its first
RAISED_BY_EDITS = frozenset({"efficacy", "generalization", "portability"})  # low before editing, and meant to be
NORMAL_95 = 1.96  # quantile of the normal distribution for a two-sided 95% interval


class Column(NamedTuple):
    """What one column shows. `variant` is empty unless a benchmark was run with several settings in the same run."""

    benchmark: str
    task: str
    metric: str
    protocol: str
    variant: str = ""

    @property
    def benchmark_label(self) -> str:
        """The benchmark, with its variant where there are several."""
        return f"{self.benchmark} #{self.variant}" if self.variant else self.benchmark

    @property
    def task_label(self) -> str:
        """The task, or nothing where it bears the benchmark's own name."""
        return "" if self.task == self.benchmark else self.task

    @property
    def name(self) -> str:
        """`benchmark/task.metric.protocol`, as in trackers and figures."""
        return f"{self.benchmark_label}/{self.task}.{self.metric}.{self.protocol}"


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores by rung and column. Rung 0 is the unedited model."""

    columns: tuple[Column, ...]
    rungs: tuple[int, ...]
    cells: Mapping[tuple[int, Column], Score]

    def value(self, rung: int, column: Column) -> float | None:
        """Return the number in a cell, or None where it was not measured."""
        score = self.cells.get((rung, column))
        return None if score is None else score.value

    def any_score(self, column: Column) -> Score:
        """Return the column's score at its lowest rung: for what does not change along the rungs."""
        return next(self.cells[(rung, column)] for rung in self.rungs if (rung, column) in self.cells)

    def chance(self, column: Column) -> float | None:
        """Return the score of guessing, where there is one."""
        return self.any_score(column).chance

    def at_chance(self, column: Column) -> bool:
        """Return whether the unedited model is not above guessing (95% interval): such a column cannot show damage.

        Never so for what edits are meant to raise.
        """
        score = self.cells.get((0, column))
        if score is None or score.chance is None or not math.isfinite(score.value) or column.metric in RAISED_BY_EDITS:
            return False
        margin = NORMAL_95 * score.stderr if score.stderr is not None and math.isfinite(score.stderr) else 0.0
        gain = score.value - score.chance if score.higher_is_better else score.chance - score.value
        return gain - margin <= 0

    def only(self, columns: Iterable[Column]) -> ScoreTable:
        """Return the table of some of its columns."""
        return ScoreTable(columns=tuple(columns), rungs=self.rungs, cells=self.cells)

    def benchmarks(self) -> tuple[str, ...]:
        """Return the benchmarks' labels, in order."""
        return tuple(dict.fromkeys(column.benchmark_label for column in self.columns))

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """Return the body as text: chance first where any column has one, then the unedited model, then every rung."""
        rows = [(rung_label(rung), *(format_number(self.value(rung, column)) for column in self.columns)) for rung in self.rungs]
        chances = [self.chance(column) for column in self.columns]
        if any(chance is not None for chance in chances):
            rows.insert(0, ("chance", *(format_number(chance) for chance in chances)))
        return tuple(rows)


def score_table(scores: Sequence[Score]) -> ScoreTable:
    """Arrange scores. Where a benchmark was run with two settings at the same rung, each setting has columns of its own."""
    split = _benchmarks_to_split(scores)
    cells: dict[tuple[int, Column], Score] = {}
    columns: dict[Column, None] = {}
    for score in scores:
        variant = score.benchmark_key[:4] if score.benchmark in split else ""
        column = Column(score.benchmark, score.task, score.metric, score.protocol, variant)
        columns[column] = None
        cells[(score.num_edits, column)] = score
    order = {label: place for place, label in enumerate(dict.fromkeys(column.benchmark_label for column in columns))}
    ordered = sorted(columns, key=lambda column: order[column.benchmark_label])  # stable: within a benchmark as measured
    return ScoreTable(columns=tuple(ordered), rungs=tuple(sorted({score.num_edits for score in scores})), cells=cells)


def headline(table: ScoreTable) -> ScoreTable:
    """Return the table with what people look at: of a benchmark of several tasks the first metric of each task and protocol.

    The parts of a benchmark of many tasks are left out where it also has their mean under its own name.
    """
    tasks: dict[str, set[str]] = {}
    first: dict[tuple[str, str, str], Column] = {}
    for column in table.columns:
        tasks.setdefault(column.benchmark_label, set()).add(column.task)
        first.setdefault((column.benchmark_label, column.task, column.protocol), column)

    def shown(column: Column) -> bool:
        all_tasks = tasks[column.benchmark_label]
        if len(all_tasks) > 1 and column is not first[column.benchmark_label, column.task, column.protocol]:
            return False
        return len(all_tasks) <= MANY_TASKS or column.benchmark not in all_tasks or column.task == column.benchmark

    return table.only(column for column in table.columns if shown(column))


def brief(table: ScoreTable) -> ScoreTable:
    """Return one protocol of each benchmark, and what no other column says of a task: enough for a line of text."""
    kept: list[Column] = []
    for label in table.benchmarks():
        mine = [column for column in table.columns if column.benchmark_label == label]
        protocols = dict.fromkeys(column.protocol for column in mine)
        protocol = next((name for name in PROTOCOLS_FIRST if name in protocols), mine[0].protocol)
        covered = {column.task for column in mine if column.protocol == protocol}
        kept += [column for column in mine if column.protocol == protocol or column.task not in covered]
    return table.only(kept)


def rung_label(rung: int) -> str:
    """Return how a row is called."""
    return "unedited" if rung == 0 else f"{rung} edit{'s' if rung > 1 else ''}"


def format_number(value: float | None) -> str:
    """Return three decimals below 100, else four significant digits; `nan` and `inf` as such."""
    if value is None:
        return MISSING
    if not math.isfinite(value) or abs(value) >= 100:
        return f"{value:.4g}"
    return f"{value:.3f}"


def _benchmarks_to_split(scores: Sequence[Score]) -> set[str]:
    """Return the benchmarks that have two keys at one rung. (A key that differs between rungs only names their requests.)"""
    keys: dict[tuple[str, int], set[str]] = {}
    for score in scores:
        keys.setdefault((score.benchmark, score.num_edits), set()).add(score.benchmark_key)
    return {benchmark for (benchmark, _), found in keys.items() if len(found) > 1}
