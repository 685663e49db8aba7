"""KnowEdit (https://arxiv.org/abs/2401.01286): ZsRE, Wikidata counterfactuals and recent Wikidata facts, with portability questions.

python launch.py dataset=knowedit dataset.subset=wiki_recent paths.data=DIR num_edits=[1,10]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editeval.datasets.easyedit import easyedit_request
from editeval.datasets.rows import Row
from editeval.datasets.source import RowDataset
from editeval.types import EditRequest


@dataclass(frozen=True, kw_only=True)
class KnowEdit(RowDataset):
    """KnowEdit's rows (subsets `zsre`, `wiki_counterfact`, `wiki_recent`); `request_id` is a hash of prompt, subject and target.

    `wiki_recent` has no true targets: its facts are new, not changed. The source repeats some facts (duplicate ids).
    """

    folder: ClassVar[str] = "knowedit"

    def parse(self, row: Row) -> EditRequest:
        """Return the request of one row.

        Raises:
            RowError: a field is missing, of another type or empty, or the subject is not in the prompt.
        """
        return easyedit_request(row, folder=f"{self.folder}/{self.subset}")
