"""ZsRE: questions of zero-shot relation extraction (https://arxiv.org/abs/1706.04115), as MEND prepared them for editing.

    python launch.py dataset=zsre paths.data=DIR num_edits=[1,10]

MEND's format (https://arxiv.org/abs/2110.11309): `src` is the question and `subject` stands in it; `alt` is the answer to write,
`answers` are the true ones, `rephrase` asks the same in other words, `loc` and `loc_ans` are a Natural Questions pair. `pred` and
`cond` hold what another model once answered, so they are not used. EasyEdit's files have the same fields, without some of the
optional ones, or EasyEdit's own (`prompt`, `target_new`, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editeval.datasets.easyedit import easyedit_request, true_answer
from editeval.datasets.rows import Row, RowError, content_id, make_request, with_placeholder
from editeval.datasets.source import RowDataset
from editeval.types import EditRequest, Probe


@dataclass(frozen=True, kw_only=True)
class ZsRE(RowDataset):
    """ZsRE's rows. The source has no ids: `request_id` is a hash of question, subject and new target.

    Texts are kept as the source has them: `loc` begins with `nq question: ` and has no question mark. A row whose `alt` is empty
    (the source has some) is a bad row.
    """

    folder: ClassVar[str] = "zsre"

    def parse(self, row: Row) -> EditRequest:
        """Return the request of one row in either format.

        Raises:
            RowError: a field is missing, of another type or empty, or the subject is not in the question.
        """
        if row.has("src"):
            return self._mend_request(row)
        if row.has("prompt"):
            return easyedit_request(row, folder=self.folder)
        raise RowError(f"neither MEND's field src nor EasyEdit's prompt; fields: {', '.join(map(str, row.fields)) or 'none'}")

    def _mend_request(self, row: Row) -> EditRequest:
        subject, target_new = row.text("subject"), row.text("alt")
        prompt = with_placeholder(row.text("src"), subject)
        return make_request(
            row,
            request_id=content_id(self.folder, prompt=prompt, subject=subject, target_new=target_new),
            prompt=prompt,
            subject=subject,
            target_new=target_new,
            target_true=true_answer(row, "answers", target_new=target_new),
            paraphrase_prompts=row.texts("rephrase"),
            neighborhood_prompts=(Probe(prompt=row.text("loc"), answer=row.text("loc_ans")),),
        )
