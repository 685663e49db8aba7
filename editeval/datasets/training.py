"""What methods learn from before the first edit: the rows of a data set, without any subject that is edited.

    python launch.py method=mend training=counterfact dataset=counterfact paths.data=DIR prepare_only=true

A method that was trained on a fact which it is then asked to write would be measured on its memory. So every row about a subject of
the edited data set is left out, whichever of its facts a run edits, and `content_hash` names the rows that are left: what is trained
on them is good for every run that edits that data set.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from editeval.datasets.text import normalize_answer
from editeval.types import ConfigError, DatasetError, EditRequest, content_key

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """A data set, as far as it is needed here."""

    @property
    def name(self) -> str:
        """What its file is called."""
        ...

    def check(self) -> None:
        """Raise DatasetError or ConfigError when the data is not there."""
        ...

    def load(self) -> tuple[EditRequest, ...]:
        """Return every valid row."""
        ...


@runtime_checkable
class FetchedRows(Protocol):
    """A data set that may come from the hub."""

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the rows to where they are found without network; return the files."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The rows of `of` whose subject no row of `without` (the data set that is edited; None: nothing is) has.

    Without `of` there are no rows here: enough for a method whose parts were trained elsewhere.

    It is an `interfaces.EditDataset` itself. Subjects are compared without regard to case, Unicode form and white space. Neighbourhood
    prompts are kept as they are: they ask for what the unedited model says.
    """

    name: str
    of: Rows | None
    without: Rows | None = None
    known_only: bool = False

    def check(self) -> None:
        """Find the files, read both sets and see that rows are left.

        Raises:
            DatasetError: as `load`.
            ConfigError: as `load`, or a setting of one of the two is wrong.
        """
        if self.of is not None:
            self.of.check()
        self.load()

    def load(self) -> tuple[EditRequest, ...]:
        """Return the rows that are left, in file order; how many were left out goes to the log.

        Raises:
            DatasetError: a file or row of either set is wrong, or nothing is left.
            ConfigError: there are no rows here.
        """
        return self._left

    def edited_subjects(self) -> frozenset[str]:
        """Return the subjects of `without` as they are compared (see `normalize_answer`).

        Raises:
            DatasetError: a file or row of it is wrong.
        """
        return frozenset() if self.without is None else frozenset(normalize_answer(request.subject) for request in self.without.load())

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the rows of `of`, where they come from the hub, to where `data=folder` finds them; return the file.

        Raises:
            DatasetError, ConfigError: it cannot be had.
        """
        return self.of.fetch(folder) if isinstance(self.of, FetchedRows) else ()

    def content_hash(self) -> str:
        """Return the hash of the rows that are left, whatever their order: part of the key of everything that is trained on them."""
        return content_key(sorted(request.source_hash or content_key(request) for request in self.load()))

    @cached_property
    def _left(self) -> tuple[EditRequest, ...]:
        if self.of is None:
            raise ConfigError(
                f"training={self.name} has no rows to learn from; choose another, such as training=counterfact, or for MEND, RLEdit and "
                "SERAC give what was trained elsewhere as method.archive"
            )
        rows = self.of.load()
        edited = self.edited_subjects()
        left = tuple(request for request in rows if normalize_answer(request.subject) not in edited)
        dropped = len(rows) - len(left)
        edited_set = self.without.name if self.without is not None else "none"
        if not left:
            raise DatasetError(
                f"all {dropped} rows of training={self.name} are about subjects of dataset={edited_set}, so nothing is left to learn from; "
                "choose another training set, or a part of the data set that leaves some (dataset.part=edit, dataset.split)"
            )
        if not dropped:
            return left
        logger.warning(
            "training %s: %d of %d rows are about subjects of dataset %s and are left out", self.name, dropped, len(rows), edited_set
        )
        return left
