"""QAEdit: real questions of open question answering that a model got wrong (https://arxiv.org/abs/2502.11177).

python launch.py dataset=qaedit paths.data=DIR num_edits=[1,10]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editeval.datasets.rows import Row, make_request, with_placeholder
from editeval.datasets.source import RowDataset
from editeval.types import EditRequest, Probe


@dataclass(frozen=True, kw_only=True)
class QAEdit(RowDataset):
    """QAEdit's rows: `prompt`, `subject`, `target`, `rephrase`, `locality`; `request_id` is `qaedit/<source>/<id>`.

    The new target is the right answer, so there is no other true target.
    """

    folder: ClassVar[str] = "qaedit"

    def parse(self, row: Row) -> EditRequest:
        """Return the request of one row.

        Raises:
            RowError: a field is missing, of another type or empty, or the subject is not in the prompt.
        """
        subject = row.text("subject")
        return make_request(
            row,
            request_id=f"{self.folder}/{row.text('source')}/{row.identifier('id')}",
            prompt=with_placeholder(row.text("prompt"), subject),
            subject=subject,
            target_new=row.text("target"),
            paraphrase_prompts=row.texts("rephrase"),
            neighborhood_prompts=tuple(Probe(prompt=pair.text("loc"), answer=pair.text("loc_ans")) for pair in row.inners("locality")),
        )
