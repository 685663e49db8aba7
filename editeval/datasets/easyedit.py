"""The row format of EasyEdit and of KnowEdit built on it (https://arxiv.org/abs/2401.01286): the subject stands inside the prompt.

Fields: `prompt`, `subject`, `target_new`; where there: `ground_truth` (a text, or a list of accepted ones), `rephrase_prompt`, one
locality pair `locality_prompt` and `locality_ground_truth`, and KnowEdit's `portability` and `locality`, each an object of lists of
`{prompt, ground_truth}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from editeval.datasets.rows import Row, RowError, content_id, make_request, with_placeholder
from editeval.datasets.text import normalize_answer
from editeval.types import EditRequest, Probe


def easyedit_request(row: Row, *, folder: str) -> EditRequest:
    """Return the request of a row in this format; its id is `<folder>/<case_id>`, or of its content where there is no case id.

    KnowEdit's locality questions (other relations of the same subject, and its one-to-many questions) become neighbourhood prompts,
    beside the locality pair. Of several accepted answers the first is kept; a question without any is left out, for it has nothing
    to be scored against.

    Raises:
        RowError: a field is missing, of another type or empty, or the subject is not in the prompt.
    """
    subject, target_new = row.text("subject"), row.text("target_new")
    prompt = with_placeholder(row.text("prompt"), subject)
    pair: tuple[Probe, ...] = ()
    if row.has("locality_prompt"):
        pair = (Probe(prompt=row.text("locality_prompt"), answer=row.text("locality_ground_truth")),)
    return make_request(
        row,
        request_id=f"{folder}/{row.identifier('case_id')}"
        if row.has("case_id")
        else content_id(folder, prompt=prompt, subject=subject, target_new=target_new),
        prompt=prompt,
        subject=subject,
        target_new=target_new,
        target_true=true_answer(row, "ground_truth", target_new=target_new),
        paraphrase_prompts=row.texts("rephrase_prompt") if row.has("rephrase_prompt") else (),
        neighborhood_prompts=pair + tuple(_questions(row, "locality")),
        portability=tuple(_questions(row, "portability")),
    )


def true_answer(row: Row, name: str, *, target_new: str) -> str | None:
    """Return the first accepted answer of a field; None where there is no answer, or where the new target is an accepted one.

    Raises:
        RowError: the field holds something else than text or lists of it.
    """
    accepted = list(_answers(row.fields.get(name), f"{row.path}{name}"))
    if not accepted or normalize_answer(target_new) in map(normalize_answer, accepted):
        return None
    return accepted[0]


def _questions(row: Row, name: str) -> Iterator[Probe]:
    if not row.has(name):
        return
    groups = row.inner(name)
    for group in groups.fields:
        if not groups.has(group):
            continue
        for question in groups.inners(group):
            answer = next(_answers(question.fields.get("ground_truth"), f"{question.path}ground_truth"), None)
            if answer is not None:
                yield Probe(prompt=question.text("prompt"), answer=answer)


def _answers(value: Any, path: str) -> Iterator[str]:
    """Yield the non-empty texts of a text, a list of them, or a list of lists of them, in order."""
    if value is None:
        return
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _answers(entry, path)
    else:
        raise RowError(f"field {path} must be a text or lists of texts; got {type(value).__name__} {value!r}")
