"""What a tracker has of a run, and what it still lacks: rows in an order that is fixed on disk before any of them is sent.

A row's place in `wandb/mirrored.jsonl` is its step in W&B. A server that says how many steps it has therefore says which rows it lacks,
whatever died in between; so each row gets there exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editeval.files import append_jsonl, read_jsonl
from editeval.runner.results import CellKey, ScoreStore
from editeval.runner.run_files import read_edits
from editeval.types import Score

LEDGER = Path("wandb") / "mirrored.jsonl"
SIGNS = ("weight_norm_ratio", "canary_ratio")

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRow:
    """One row of a tracker: its lasting name, its numbers with `num_edits` among them, and the cell of a benchmark's row."""

    name: str
    numbers: Row
    cell: CellKey | None = None


class Ledger:
    """The names of the rows of one run in the order in which they are sent."""

    def __init__(self, run_dir: Path | str) -> None:
        self._path = Path(run_dir) / LEDGER
        rows, _ = read_jsonl(self._path)
        self.names = list(dict.fromkeys(str(row["mirrored"]) for row in rows))
        self._known = set(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __len__(self) -> int:
        return len(self.names)

    def add(self, names: Iterable[str]) -> None:
        """Give these rows the next places, on disk; those that have one keep it."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        append_jsonl(self._path, [{"mirrored": name} for name in new])
        self.names += new
        self._known.update(new)


def edit_row(row: Mapping[str, Any]) -> TrackedRow:
    """Return an edit (a row of `edits.jsonl`, or such an event as a mapping) as a tracker's row."""
    numbers = {f"edit/{name}": float(value) for name, value in row["diagnostics"].items()}
    numbers |= {f"edit/{name}": float(row[name]) for name in ("seconds", *SIGNS) if row.get(name) is not None}
    numbers["num_edits"] = int(row["num_edits"])
    return TrackedRow(name=f"edit {row['step']} {row['digest']}", numbers=numbers)


def cell_row(scores: Sequence[Score]) -> TrackedRow:
    """Return a benchmark's scores of one state as a tracker's row."""
    first = scores[0]
    numbers: Row = {"num_edits": first.num_edits, **{score.name: score.value for score in scores}}
    cell = CellKey(first.num_edits, first.benchmark, first.benchmark_key, first.state_digest)
    return TrackedRow(name=" ".join(["cell", *map(str, cell)]), numbers=numbers, cell=cell)


def rows_on_disk(run_dir: Path | str) -> dict[str, TrackedRow]:
    """Return everything that a tracker can have of a run, by name, in the order of the trajectory."""
    edits = [edit_row(row) for row in read_edits(run_dir)]
    cells: dict[tuple[str, ...], list[Score]] = {}
    for score in ScoreStore(run_dir).scores():
        cells.setdefault((str(score.num_edits), score.benchmark, score.benchmark_key, score.state_digest), []).append(score)
    rows = [*edits, *(cell_row(scores) for scores in cells.values())]
    ordered = sorted(rows, key=lambda row: row.numbers["num_edits"])  # stable: a rung's edit comes before its scores
    return {row.name: row for row in ordered}
