"""Which numbers belong into one picture: the same benchmark, the same protocol, the same unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editeval.runner.table import PROTOCOLS_FIRST, Column, ScoreTable, format_number, rung_label

SHARE = "share correct"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes: curves over the number of edits that share a benchmark, a protocol and a unit."""

    title: str
    unit: str
    protocol: str
    table: ScoreTable

    @property
    def columns(self) -> tuple[Column, ...]:
        """The curves."""
        return self.table.columns

    @property
    def is_share(self) -> bool:
        """Whether the axis runs from 0 to 1, higher being better."""
        return self.unit == SHARE

    def label(self, column: Column) -> str:
        """Return a curve's name: the least that tells it from the others."""
        several_tasks = len({other.task for other in self.columns}) > 1
        several_metrics = len({other.metric for other in self.columns}) > 1
        parts = [column.task_label if several_tasks else "", column.metric if several_metrics or not several_tasks else ""]
        return " ".join(part for part in parts if part).replace("_", " ")

    def description(self) -> str:
        """Return the picture in words, for those who cannot see it."""
        sentences = []
        for column in self.columns:
            values = [(rung, self.table.value(rung, column)) for rung in self.table.rungs]
            told = ", ".join(f"{rung_label(rung)} {format_number(value)}" for rung, value in values if value is not None)
            chance = self.table.chance(column)
            sentences.append(f"{self.label(column)}: {told}" + ("" if chance is None else f" (chance {format_number(chance)})"))
        return f"{self.title}, {self.unit} by number of edits. " + "; ".join(sentences) + "."


def panels(table: ScoreTable) -> tuple[Panel, ...]:
    """Return every panel of a table, benchmark by benchmark."""
    grouped: dict[tuple[str, str, str], list[Column]] = {}
    for column in table.columns:
        grouped.setdefault((column.benchmark_label, column.protocol, _unit(table, column)), []).append(column)
    return tuple(
        Panel(title=f"{label} ({protocol})".replace("_", " "), unit=unit, protocol=protocol, table=table.only(columns))
        for (label, protocol, unit), columns in grouped.items()
    )


def overview(every: Sequence[Panel]) -> tuple[Panel, ...]:
    """Return the panels that tell the story: of each benchmark one of its shares, and what has a unit of its own."""
    chosen: list[Panel] = []
    for label in dict.fromkeys(panel.columns[0].benchmark_label for panel in every):
        mine = [panel for panel in every if panel.columns[0].benchmark_label == label]
        shares = [panel for panel in mine if panel.is_share]
        preferred = [panel for protocol in PROTOCOLS_FIRST for panel in shares if panel.protocol == protocol]
        chosen += (preferred or shares)[:1]
        chosen += [panel for panel in mine if not panel.is_share and not (shares and panel.unit == LOG_PROBABILITY)]
    return tuple(chosen)


LOG_PROBABILITY = "log-probability (nats)"


def _unit(table: ScoreTable, column: Column) -> str:
    if column.metric.endswith("log_prob"):
        return LOG_PROBABILITY
    values = [value for rung in table.rungs if (value := table.value(rung, column)) is not None and math.isfinite(value)]
    if values and all(0 <= value <= 1 for value in values) and table.any_score(column).higher_is_better:
        return SHARE
    better = "higher" if table.any_score(column).higher_is_better else "lower"
    return f"{column.metric} ({better} is better)".replace("_", " ")
