"""Score tables as text for other programs and papers: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from editeval.runner.retention import Retention
from editeval.runner.table import ScoreTable
from editeval.runner.tracked_tables import matrix_table


def table_csv(table: ScoreTable) -> str:
    """Return one row a rung with unrounded numbers, the chance level first; a column is named as in `Column.name`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["num_edits", *(column.name for column in table.columns)])
    writer.writerow(["chance", *(_exact(table.chance(column)) for column in table.columns)])
    for rung in table.rungs:
        writer.writerow([rung, *(_exact(table.value(rung, column)) for column in table.columns)])
    return text.getvalue()


def matrix_csv(matrix: Retention) -> str:
    """Return one row a fact in editing order, one column a rung; empty where a fact was not asked."""
    text = io.StringIO()
    table = matrix_table(matrix)
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


def table_markdown(table: ScoreTable) -> str:
    """Return a Markdown part a benchmark: rungs down, metrics across, rounded for reading; `*` marks what is at chance."""
    parts = []
    for label in table.benchmarks():
        part = table.only(column for column in table.columns if column.benchmark_label == label)
        names = [" ".join(filter(None, (column.task_label, column.metric))) for column in part.columns]
        marks = ["*" if part.at_chance(column) else "" for column in part.columns]
        heads = [f"{name}{mark} ({column.protocol})" for name, mark, column in zip(names, marks, part.columns, strict=True)]
        lines = [
            markdown_row([label, *heads]),
            markdown_row([":--", *("--:" for _ in part.columns)]),
            *(markdown_row(row) for row in part.rows()),
        ]
        parts.append("\n".join(lines))
    notes = ["`*` the unedited model is not above chance there"] if any(map(table.at_chance, table.columns)) else []
    return "\n\n".join([*parts, *notes]) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)
