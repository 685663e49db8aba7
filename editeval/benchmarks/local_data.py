"""Benchmark data from a local folder of JSON lines: `<root>/<folder>[/<config>]/<split>.jsonl`.

No network and no data-set cache: rows are read, checked line by line, and handed over in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from editeval.files import files_hash
from editeval.types import DatasetError

SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """One data set's folder; `config` names below are its sub-folders (None where a data set has none)."""

    folder: Path

    def splits(self, config: str | None) -> dict[str, Path]:
        """Return split name -> file.

        Raises:
            DatasetError: no such folder, or no split in it.
        """
        folder = self.folder / config if config else self.folder
        if not folder.is_dir():
            known = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
            there = f"has {', '.join(known[:8])}{' ...' if len(known) > 8 else ''}" if known else "holds no folder"
            listing = f"{folder.parent} {there}" if folder.parent.is_dir() else "its parent is missing too"
            raise DatasetError(f"no folder {folder}; {listing}; set paths.data to a folder laid out as <data set>/<config>/<split>{SUFFIX}")
        files = {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}
        if not files:
            raise DatasetError(f"{folder} holds no <split>{SUFFIX} file; fill it, or leave paths.data out to use the hub")
        return files

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """Return every row of a file; raises as `numbered_rows`."""
        return list(self.numbered_rows(path).values())

    def numbered_rows(self, path: Path) -> dict[int, dict[str, Any]]:
        """Return line number (from 1) -> row.

        Raises:
            DatasetError: a line that is no JSON object (a truncated download ends in one), or has other fields than the first row (what
                it lacks would be asked as "None"), or a file that cannot be read or has no rows.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error.strerror}; copy it again") from error
        rows: dict[int, dict[str, Any]] = {}
        fields: frozenset[str] | None = None
        # Bytes, so that a file that was cut within a character is told of by its line as well.
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}, line {number}: not JSON ({error}); the file may be truncated, copy it again") from error
            if not isinstance(row, dict):
                raise DatasetError(f"{path}, line {number}: a JSON {type(row).__name__}, not an object with the row's fields")
            fields = frozenset(row) if fields is None else fields
            if row.keys() != fields:
                lacking, more = sorted(fields - row.keys()), sorted(row.keys() - fields)
                differs = f"lacks {', '.join(map(repr, lacking))}" if lacking else f"has {', '.join(map(repr, more))} too"
                raise DatasetError(f"{path}, line {number}: {differs}, unlike the first row; give every row the same fields")
            rows[number] = row
        if not rows:
            raise DatasetError(f"{path} has no rows; copy it again")
        return rows

    @cached_property
    def content_hash(self) -> str:
        """The sha256 over every file of the data set: names and bytes."""
        return files_hash(self.folder, f"**/*{SUFFIX}")
