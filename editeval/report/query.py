"""Every score and edit of a folder of runs as tables that SQL can be asked of: `python -m editeval query runs/ "SELECT ..."`.

The table `scores` holds what stands, as `ScoreStore.scores` says it; `edits` the log of edits; `runs` one line a run. They are read from
the runs' own files at every call (a thousand runs take about a second) and asked with DuckDB; nothing else is kept on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editeval.runner.results import ScoreStore
from editeval.runner.run_files import read_edits, read_manifest
from editeval.types import EditevalError, Score

if TYPE_CHECKING:
    import pyarrow

OVERVIEW = """
SELECT model, method, dataset, seed, num_edits, benchmark, task, metric, protocol, value, stderr, n, chance
FROM scores ORDER BY ALL
"""
WRITERS = {".csv": "(FORMAT csv, HEADER)", ".parquet": "(FORMAT parquet)", ".json": "(FORMAT json)"}

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The rows that a query gave, and their columns' names."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def query(folders: Sequence[Path], sql: str = OVERVIEW, *, to: Path | None = None) -> Answer:
    """Ask the tables `scores`, `edits` and `runs` of these runs' folders; with `to`, write the answer to a .csv, .parquet or .json file.

    Raises:
        EditevalError: the question is no SQL that can be answered, or `to` is no kind of file that can be written.
    """
    import duckdb

    writer = None if to is None else WRITERS.get(to.suffix)
    if to is not None and writer is None:
        raise EditevalError(f"--to {to}: a file that ends in {', '.join(WRITERS)}; got {to.suffix or 'no ending'}")
    with duckdb.connect() as connection:
        for name, table in _tables(folders).items():
            connection.register(name, table)
        try:
            question = sql.strip().rstrip(";")
            if to is not None:  # asked once: what is written is what is shown
                to.parent.mkdir(parents=True, exist_ok=True)
                connection.execute(f"CREATE TABLE answer AS {question}")
                question = "SELECT * FROM answer"
                path = str(to.absolute()).replace("'", "''")
                connection.execute(f"COPY answer TO '{path}' {writer}")
            found = connection.execute(question)
            columns = tuple(column[0] for column in found.description or ())
            rows = found.fetchall()
        except duckdb.Error as error:
            tables = "tables: scores, edits, runs; `DESCRIBE scores` lists its columns"
            raise EditevalError(f"{str(error).strip().splitlines()[0]} ({tables})") from error
    return Answer(columns=columns, rows=tuple(rows))


def _tables(folders: Sequence[Path]) -> dict[str, pyarrow.Table]:
    """Return the three tables; columns of a run stand first in each."""
    import pyarrow

    text, whole, real, truth = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.bool_()
    of_run = {"run": text, "model": text, "method": text, "dataset": text, "seed": whole}
    kinds = {"str": text, "int": whole, "float": real, "bool": truth}  # of Score's annotations, `| None` or not
    schemas = {
        "runs": {**of_run, "edit_key": text, "config": text},
        "scores": {**of_run, **{item.name: kinds[str(item.type).split(" ")[0]] for item in fields(Score)}, "chance_corrected": real},
        "edits": {
            **of_run,
            "step": whole,
            "num_edits": whole,
            "request_ids": pyarrow.list_(text),
            "seconds": real,
            "digest": text,
            "diagnostics": text,
        },
    }
    rows: dict[str, list[Row]] = {name: [] for name in schemas}
    for folder in folders:
        for name, row in _rows(folder):
            rows[name].append(row)
    return {
        name: pyarrow.table({column: pyarrow.array([row.get(column) for row in rows[name]], kind) for column, kind in schema.items()})
        for name, schema in schemas.items()
    }


def _rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """Yield (table, row) of one run."""
    manifest = read_manifest(folder)
    config = manifest.get("config") or {}
    names = {group: (config.get(group) or {}).get("name") for group in ("model", "method", "dataset")}
    run = {"run": str(folder), **names, "seed": config.get("seed")}
    yield "runs", {**run, "edit_key": manifest.get("edit_key"), "config": json.dumps(config)}
    for score in ScoreStore(folder).scores():
        yield "scores", {**run, **vars(score), "chance_corrected": score.chance_corrected}
    for edit in read_edits(folder):
        yield "edits", {**run, **edit, "diagnostics": json.dumps(edit.get("diagnostics") or {})}
