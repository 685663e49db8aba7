"""The built-in data set: facts of many relations, written for this project, in `facts.yaml`.

A relation lists its templates and its (subject, true answer) pairs; everything else of an `EditRequest` follows from them by
fixed rules, so that the file stays readable and a row can be checked by eye.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from editeval.types import DatasetError, EditRequest, Probe, content_key

FACTS_FILE = Path(__file__).with_name("facts.yaml")
NEIGHBORS = 4


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of `facts.yaml`, or of a file of the same form.

    The counterfactual target is another answer of the same relation; neighbours are other subjects of the relation with their
    own true answers. Both are drawn by a hash of the fact, so that they never depend on the order or number of facts.
    """

    name: str = "facts"
    file: str | None = None
    known_only: bool = True

    def check(self) -> None:
        """Raise DatasetError when the file is missing or a relation is malformed."""
        self.load()

    def load(self) -> tuple[EditRequest, ...]:
        """Return every fact, relation after relation.

        Raises:
            DatasetError: with file, relation and reason.
        """
        path = Path(self.file) if self.file else FACTS_FILE
        try:
            relations = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise DatasetError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(relations, dict) or not relations:
            raise DatasetError(f"{path} must map relations to their templates and pairs; got {type(relations).__name__}")
        requests: list[EditRequest] = []
        for relation, entry in relations.items():
            try:
                requests.extend(_expand(str(relation), entry))
            except (KeyError, TypeError, ValueError) as error:
                raise DatasetError(f"{path}, relation {relation}: {type(error).__name__}: {error}") from error
        return tuple(requests)


def _expand(relation: str, entry: Mapping[str, Any]) -> Iterator[EditRequest]:
    pairs: Mapping[str, str] = entry["pairs"]
    answers = sorted(set(pairs.values()))
    if len(answers) < 2 or len(pairs) < 4:
        raise ValueError(f"needs at least two different answers and four pairs, has {len(answers)} and {len(pairs)}")
    for template in (entry["prompt"], *entry["paraphrases"]):
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold exactly one '{{}}'")
    for subject, answer in pairs.items():
        identity = f"{relation}/{subject.lower().replace(' ', '-')}"
        if not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"{subject!r} has answer {answer!r}; quote it if YAML reads it as something else than text")
        target = min((other for other in answers if _differ(other, answer)), key=_draw(identity, "target"))
        others = [other for other in pairs if other != subject and pairs[other] != target]
        neighbors = sorted(others, key=_draw(identity, "neighbor"))[:NEIGHBORS]
        request = EditRequest(
            request_id=identity,
            prompt=entry["prompt"],
            subject=subject,
            target_new=target,
            target_true=answer,
            paraphrase_prompts=tuple(template.replace("{}", subject) for template in entry["paraphrases"]),
            neighborhood_prompts=tuple(Probe(prompt=entry["prompt"].replace("{}", other), answer=pairs[other]) for other in neighbors),
            portability=tuple(_portability(entry.get("portability"), subject, target)),
        )
        yield EditRequest(**{**request.__dict__, "source_hash": content_key(request)})


def _portability(entry: Mapping[str, Any] | None, subject: str, target: str) -> Sequence[Probe]:
    """What follows from the edit, where the relation says so for the new answer."""
    if entry is None or target not in entry["answers"]:
        return ()
    return (Probe(prompt=entry["prompt"].replace("{}", subject), answer=entry["answers"][target]),)


def _differ(candidate: str, answer: str) -> bool:
    """Whether the two answers part at their first word, so that free generation can tell them apart."""
    return candidate.split()[0].lower() != answer.split()[0].lower()


def _draw(identity: str, purpose: str) -> Callable[[str], str]:
    """Return a sort key that is a fixed shuffle for each fact."""
    return lambda option: hashlib.sha256(f"{identity}\x1f{purpose}\x1f{option}".encode()).hexdigest()
