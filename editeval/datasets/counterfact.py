"""CounterFact: counterfactual facts of ParaRel relations (ROME, https://arxiv.org/abs/2202.05262), in two formats.

    python launch.py dataset=counterfact paths.data=DIR num_edits=[1,10]

The fields of a row tell its format: `requested_rewrite` is ROME's (MEMIT's multi-CounterFact has the same), `target_new` beside
`prompt` is EasyEdit's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editeval.datasets.easyedit import easyedit_request
from editeval.datasets.rows import Row, RowError, make_request
from editeval.datasets.source import RowDataset
from editeval.types import EditRequest, Probe

EASYEDIT_FIELDS = ("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")


@dataclass(frozen=True, kw_only=True)
class CounterFact(RowDataset):
    """CounterFact's rows; `request_id` is `counterfact/<case_id>`, the same in both formats.

    The neighbourhood prompts are about subjects that share the true object, so each expects the fact's own true target. ROME's
    `attribute_prompts` and `generation_prompts` are not used.
    """

    folder: ClassVar[str] = "counterfact"

    def parse(self, row: Row) -> EditRequest:
        """Return the request of one row in either format.

        Raises:
            RowError: a field is missing, of another type or empty, the subject is not in the prompt, or nothing would change.
        """
        if row.has("requested_rewrite"):
            request = self._rome_request(row)
        elif row.has("prompt", "target_new"):
            for name in EASYEDIT_FIELDS:
                row.texts(name)
            request = easyedit_request(row, folder=self.folder)
        else:
            there = ", ".join(map(str, row.fields)) or "none"
            raise RowError(f"neither ROME's field requested_rewrite nor EasyEdit's prompt and target_new; fields: {there}")
        if request.target_true is None:
            raise RowError(f"the new target {request.target_new!r} is the true one")
        return request

    def _rome_request(self, row: Row) -> EditRequest:
        rewrite = row.inner("requested_rewrite")
        target_true = rewrite.inner("target_true").text("str")
        return make_request(
            row,
            request_id=f"{self.folder}/{row.identifier('case_id')}",
            prompt=rewrite.text("prompt"),
            subject=rewrite.text("subject"),
            target_new=rewrite.inner("target_new").text("str"),
            target_true=target_true,
            paraphrase_prompts=row.texts("paraphrase_prompts"),
            neighborhood_prompts=tuple(Probe(prompt=prompt, answer=target_true) for prompt in row.texts("neighborhood_prompts")),
        )
