"""Where the rows of a data set come from: a file of one's own, a folder of data sets, or the Hugging Face hub.

`RowDataset` holds what all data sets of rows share. Its subclasses say one thing: how a row becomes a request.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from editeval.datasets.rows import ON_BAD_ROW, LoadedRows, Row, RowError, RowNote, load_requests, read_rows
from editeval.files import write_jsonl
from editeval.types import ConfigError, DatasetError, EditRequest, HubError

SUFFIXES = (".jsonl", ".json")
HUB_FIELDS = ("id", "file", "revision")
DEFAULT_SUBSET = "default"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RowDataset(ABC):
    """Facts in rows, implementing `interfaces.EditDataset`.

    The first of these that is set says where the rows are. With the first two, nothing is asked of the network.

    - `file`: a file of JSON or JSON lines.
    - `data`: a folder of data sets with the file `<data>/<folder>/<subset>/<split>.jsonl` (or `.json`); no middle folder where
      `subset` is None.
    - `hub`: for each subset (`default` where it is None) a copy on the Hugging Face hub: `id`, and where needed `revision` and
      `file`, a path inside the repository that is read as it is (`{split}` stands for the split). Without `file` the repository is
      loaded by `datasets.load_dataset`.
    """

    folder: ClassVar[str]

    name: str
    subset: str | None
    split: str
    data: str | None = None
    file: str | None = None
    hub: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    on_bad_row: str = "error"
    known_only: bool = False

    def __post_init__(self) -> None:
        if self.on_bad_row not in ON_BAD_ROW:
            raise ConfigError(f"dataset.on_bad_row={self.on_bad_row} is unknown; one of: {', '.join(ON_BAD_ROW)}")
        for subset, copy in self.hub.items():
            unknown = sorted(set(copy) - set(HUB_FIELDS))
            if unknown or not copy.get("id"):
                problem = f"has no setting {unknown[0]!r}" if unknown else "has no id"
                raise ConfigError(f"dataset.hub.{subset} {problem}; it knows: {', '.join(HUB_FIELDS)}")

    @abstractmethod
    def parse(self, row: Row) -> EditRequest:
        """Return the request of one row; raises RowError with what is wrong."""

    def check(self) -> None:
        """Find the file (from the hub: fetch it into its cache) and read the first row that is valid.

        Raises:
            DatasetError: no such file, nothing to be had from the hub, or a bad row before the first valid one under `error`.
            ConfigError: the subset has no copy on the hub, or `known_only` is set and no row has a true target.
        """
        bad: RowNote | None = None
        valid = 0
        for row in self._rows():
            try:
                if isinstance(row, Row):
                    if self.parse(row).target_true is not None or not self.known_only:
                        return
                    valid += 1
                    continue
                bad = row
            except RowError as error:
                bad = RowNote(file=row.file, number=row.number, reason=str(error))
            if self.on_bad_row == "error":
                raise DatasetError(f"{bad}; correct it, or set dataset.on_bad_row=skip to leave such rows out")
        if valid:
            raise ConfigError(
                f"dataset.known_only=true asks which facts the model knows, but none of the {valid} rows of {self._place()} "
                "has a true target; set dataset.known_only=false"
            )
        raise DatasetError(f"{self._place()} has no valid row{f' (the last: {bad})' if bad else ''}; choose another file, split or subset")

    def load(self) -> tuple[EditRequest, ...]:
        """Return every valid row, in file order; what was left out goes to the log (`read` returns it).

        Raises:
            DatasetError: as `read`.
        """
        rows = self.read()
        for note in rows.notes:
            logger.info("dataset %s: %s", self.name, note)
        if rows.skipped:
            logger.warning("dataset %s: %s", self.name, rows.summary())
        return rows.requests

    def read(self) -> LoadedRows:
        """Return every valid row, and what was left out and why.

        Raises:
            DatasetError: no such file, a bad row under `on_bad_row=error`, or no valid row.
            ConfigError: the subset has no copy on the hub.
        """
        return load_requests(self._rows(), self.parse, on_bad_row=self.on_bad_row)

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the rows of the hub, as they are, to where `data=folder` finds them; return the file (none for a file of one's own).

        Raises:
            DatasetError: the hub does not give them, or a row cannot be read.
            ConfigError: no copy on the hub is known.
        """
        if self.file is not None:
            return ()
        rows = []
        for row in self._hub_rows():
            if not isinstance(row, Row):
                raise DatasetError(f"{row}; the copy on the hub is damaged")
            rows.append(row.fields)
        path = folder / f"{self._inside()}.jsonl"
        write_jsonl(path, rows)
        return (path,)

    def _rows(self) -> Iterator[Row | RowNote]:
        if self.file is not None:
            return read_rows(_existing(Path(self.file).expanduser()))
        if self.data is not None:
            root = Path(self.data).expanduser()
            path = find_file(root, self.folder, self.subset, self.split)
            return read_rows(path, name=str(path.relative_to(root)))
        return self._hub_rows()

    def _hub_rows(self) -> Iterator[Row | RowNote]:
        copy = self.hub.get(self.subset or DEFAULT_SUBSET)
        expected = f"DIR/{self._inside()}.jsonl"
        if copy is None:
            there = f"dataset.hub has: {', '.join(sorted(self.hub))}" if self.hub else "dataset.hub is empty"
            raise ConfigError(
                f"dataset {self.name}: no copy of the subset {self.subset or DEFAULT_SUBSET} on the hub is known ({there}); "
                f"choose one of these as dataset.subset, or set paths.data=DIR (reads {expected}) or dataset.file=FILE"
            )
        try:
            return _fetched(repository=str(copy["id"]), file=copy.get("file"), revision=copy.get("revision"), split=self.split)
        except (OSError, ValueError) as error:
            raise HubError(
                f"dataset {self.name}: cannot get {self._place()}: {type(error).__name__}: {error}; "
                f"without a network set paths.data=DIR (reads {expected}) or dataset.file=FILE"
            ) from error

    def _place(self) -> str:
        if self.file is not None:
            return self.file
        if self.data is not None:
            return f"{self.data}/{self._inside()}"
        return f"split {self.split} of {self.hub.get(self.subset or DEFAULT_SUBSET, {}).get('id')} from the hub"

    def _inside(self) -> str:
        return "/".join(part for part in (self.folder, self.subset, self.split) if part)


def find_file(root: Path, folder: str, subset: str | None, split: str) -> Path:
    """Return `<root>/<folder>/<subset>/<split>.jsonl`, or the `.json` beside it.

    Raises:
        DatasetError: it is not there; the message says what is, from the first folder that is missing.
    """
    if not root.is_dir():
        raise DatasetError(f"paths.data={root} is no folder; give the folder that holds {folder}/")
    at = root
    for part, setting in ((folder, "paths.data"), (subset, "dataset.subset")):
        if part is None:
            continue
        if not (at / part).is_dir():
            there = sorted(path.name for path in at.iterdir() if path.is_dir())
            raise DatasetError(f"{at} has no folder {part}; it has: {', '.join(there) or 'none'}; set {setting}")
        at = at / part
    for suffix in SUFFIXES:
        if (at / f"{split}{suffix}").is_file():
            return at / f"{split}{suffix}"
    there = sorted(path.stem for path in at.iterdir() if path.suffix in SUFFIXES)
    raise DatasetError(f"{at} has no file {split}.jsonl or {split}.json; its splits: {', '.join(there) or 'none'}; set dataset.split")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DatasetError(f"dataset.file={path} is no file; give a file of JSON or JSON lines")
    return path


def _fetched(*, repository: str, file: str | None, revision: str | None, split: str) -> Iterator[Row | RowNote]:
    """Return the rows of a data set on the hub, from its cache where they are there.

    Raises:
        OSError: no network, no such repository, or no such file in it.
        ValueError: no such split.
    """
    if file is not None:
        from huggingface_hub import hf_hub_download

        # The file as it is: nested fields of changing types have no common table schema.
        inside = file.format(split=split)
        path = hf_hub_download(repository, inside, repo_type="dataset", revision=revision)
        return read_rows(Path(path), name=f"{repository}/{inside}")
    from datasets import load_dataset

    table = load_dataset(repository, split=split, revision=revision)
    name = f"{repository}/{split}"
    return (Row(fields=fields, file=name, number=number) for number, fields in enumerate(table, start=1))
