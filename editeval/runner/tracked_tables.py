"""What a tracker shows as tables: the items behind a cell's numbers, and which of the earlier facts are still there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editeval.runner.results import ScoreStore
from editeval.runner.retention import Retention, retention

Value = str | float | int | bool | None


@dataclass(frozen=True, kw_only=True)
class TrackedTable:
    """A table: one tuple of `rows` a line, in the order of `columns`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, kw_only=True)
class TableRules:
    """Which tables there are: `samples` items of each cell (0: no such table), a retention matrix of each `metric.protocol`."""

    samples: int
    retention: tuple[str, ...]


def tables_of(store: ScoreStore, *, num_edits: int, benchmark: str, benchmark_key: str, rules: TableRules) -> dict[str, TrackedTable]:
    """Return the tables of one cell by name; a table without a line is left out.

    The retention matrix holds every rung up to this one that was measured with samples of facts.
    """
    records = store.samples(num_edits, benchmark, benchmark_key)
    tables = {f"{benchmark}/samples": _samples(records[: rules.samples])} if rules.samples else {}
    if any("position" in record for record in records):
        rungs = sorted({score.num_edits for score in store.scores() if score.benchmark == benchmark and score.num_edits <= num_edits})
        by_rung = {rung: records if rung == num_edits else store.samples(rung, benchmark) for rung in rungs}
        for name in rules.retention:
            metric, _, protocol = name.partition(".")
            matrix = retention(by_rung, metric=metric, protocol=protocol)
            if matrix is not None:
                tables[f"{benchmark}/retention/{name}"] = matrix_table(matrix)
    return {name: table for name, table in tables.items() if table.rows}


def _samples(records: Sequence[Mapping[str, Any]]) -> TrackedTable:
    """Return one line an item; what is no plain value is put as JSON."""
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    return TrackedTable(columns=columns, rows=tuple(tuple(_plain(record.get(name)) for name in columns) for record in records))


def _plain(value: Any) -> Value:
    if value is None or isinstance(value, (str, int, float)):
        # W&B fixes a column's type by its first line: an id that is a number in one task and a word in the next is a word in all.
        return value if isinstance(value, (float, bool)) or value is None else str(value)
    return json.dumps(value, ensure_ascii=False)


def matrix_table(matrix: Retention) -> TrackedTable:
    """Return one line a fact, one column a rung."""
    rows = zip(matrix.positions, matrix.request_ids, matrix.values, strict=True)
    return TrackedTable(
        columns=("position", "request_id", *(f"after {rung}" for rung in matrix.rungs)),
        rows=tuple((position, request_id, *values) for position, request_id, values in rows),
    )
