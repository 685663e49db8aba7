"""The built-in editing set: facts of many relations, written for this project.

    python launch.py dataset=facts num_edits=[1,5,10]

`facts.yaml` holds relations; a pair of subject and object becomes one request. The counterfactual is another object of the
relation and the neighbours are other subjects of it, each chosen by a hash of what it is chosen for: the same on every
machine, and no pair's choice depends on where it stands in the file.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from editeval.datasets.rows import ON_BAD_ROW, LoadedRows, Row, RowError, RowNote, load_requests, make_request
from editeval.datasets.text import contains_answer, normalize_answer
from editeval.types import ConfigError, DatasetError, EditRequest, Probe, seed_for

BUILT_IN = Path(__file__).with_suffix(".yaml")
NEIGHBORS = 4
MIN_NEIGHBORS = 3
MIN_PARAPHRASES = 2
PARTS = ("all", "edit", "train")
TRAIN_SHARE = 3  # one subject in so many is of the part `train`
PART_SALT = 31  # which subjects: with this one the first facts that the default run edits are all of the part `edit`

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The relations of a file in the format that the head of `facts.yaml` describes (None: that file).

    `part` chooses facts by a hash of their subject: `train` and `edit` have no subject in common and are together `all`. A fact is the
    same row in every part; neighbours may be of any.
    """

    name: str = "facts"
    file: str | None = None
    part: str = "all"
    on_bad_row: str = "error"
    known_only: bool = True

    def __post_init__(self) -> None:
        if self.on_bad_row not in ON_BAD_ROW:
            raise ConfigError(f"dataset.on_bad_row={self.on_bad_row} is unknown; one of: {', '.join(ON_BAD_ROW)}")
        if self.part not in PARTS:
            raise ConfigError(f"dataset.part={self.part} is unknown; one of: {', '.join(PARTS)}")

    def check(self) -> None:
        """Expand every fact; that takes a fraction of a second.

        Raises:
            DatasetError: as `load`.
        """
        self.read()

    def load(self) -> tuple[EditRequest, ...]:
        """Return every fact, in file order; `capital/france` is the id of the fact about France under `capital`.

        Raises:
            DatasetError: the file cannot be read, a relation is not in the format, or (`on_bad_row=error`) a fact is not sound.
        """
        rows = self.read()
        if rows.skipped:
            logger.warning("dataset %s: %s", self.name, rows.summary())
        return rows.requests

    def read(self) -> LoadedRows:
        """Return every fact, and what was left out and why; raises as `load`."""
        path = BUILT_IN if self.file is None else Path(self.file).expanduser()
        rows = load_requests(_rows(path), _request, on_bad_row=self.on_bad_row)
        if self.part == "all":
            return rows
        return replace(rows, requests=tuple(request for request in rows.requests if _part(request.subject) == self.part))


@dataclass(frozen=True, kw_only=True)
class Consequence:
    """A question whose answer follows from the object: by object, the answer."""

    prompt: str
    answers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One relation of the file: how it is asked, and who stands in it."""

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    portability: tuple[Consequence, ...]
    also_true: Mapping[str, tuple[str, ...]]
    pairs: Mapping[str, str]

    def expand(self, subject: str) -> dict[str, Any]:
        """Return the whole row of a subject: everything that its request is made of.

        Raises:
            RowError: no object of the relation can be its counterfactual.
        """
        true, new = self.pairs[subject], self._counterfactual(subject)
        return {
            "id": f"{self.name}/{_slug(subject)}",
            "prompt": self.prompt,
            "subject": subject,
            "target_true": true,
            "target_new": new,
            "paraphrases": [template.replace("{}", subject) for template in self.paraphrases],
            "neighborhood": [
                {"prompt": self.prompt.replace("{}", other), "answer": self.pairs[other]} for other in self._neighbors(subject, new)
            ],
            "portability": self._portability(subject, true, new),
        }

    def _counterfactual(self, subject: str) -> str:
        """Return the object to write: false of the subject, and told from the true one by its first word."""
        true = (self.pairs[subject], *self.also_true.get(subject, ()))
        first_words = {normalize_answer(answer).split()[0] for answer in true}
        candidates = {answer for answer in self.pairs.values() if normalize_answer(answer).split()[0] not in first_words}
        if not candidates:
            raise RowError(f"relation {self.name} has no object that is false of {subject!r}; add pairs with other objects")
        return min(candidates, key=lambda answer: seed_for("counterfactual", self.name, subject, answer))

    def _neighbors(self, subject: str, target_new: str) -> list[str]:
        """Return the other subjects to ask about; those of which the new object is true come last."""
        others = [other for other in self.pairs if other != subject]
        return sorted(
            others,
            key=lambda other: (self.pairs[other] == target_new, seed_for("neighbor", self.name, subject, other)),
        )[:NEIGHBORS]

    def _portability(self, subject: str, true: str, new: str) -> list[dict[str, str]]:
        """Return the first question that the edit gives another answer, if there is one."""
        for question in self.portability:
            before, after = question.answers.get(true), question.answers.get(new)
            if before is not None and after is not None and before != after:
                return [{"prompt": question.prompt.replace("{}", subject), "answer": after}]
        return []


def read_relations(path: Path) -> tuple[Relation, ...]:
    """Return the relations of a file, in order.

    Raises:
        DatasetError: it cannot be read or is not in the format; the message names the relation.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)  # noqa: S506  # a BaseLoader: makes text only
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} is not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds no relations; the head of {BUILT_IN.name} describes the format")
    return tuple(_relation(Row(fields={str(name): body}, file=path.name, number=1), str(name)) for name, body in content.items())


class _TextLoader(yaml.BaseLoader):
    """Every scalar is text (`N`, `1789`), and a key that occurs twice is an error rather than the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=True)
        if len(mapping) != len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.MarkedYAMLError(problem=f"{twice!r} occurs twice", problem_mark=node.start_mark)
        return mapping


def _relation(row: Row, name: str) -> Relation:
    """Return one relation with its format checked."""
    try:
        body = row.inner(name)
        unknown = sorted(set(body.fields) - {"prompt", "paraphrases", "portability", "also_true", "pairs"})
        if unknown:
            raise RowError(f"field {name}.{unknown[0]} is unknown; there are prompt, paraphrases, portability, also_true, pairs")
        relation = Relation(
            name=name,
            prompt=body.text("prompt"),
            paraphrases=body.texts("paraphrases"),
            portability=tuple(
                Consequence(prompt=question.text("prompt"), answers=_texts_by_name(question.inner("answers")))
                for question in (body.inners("portability") if body.has("portability") else ())
            ),
            also_true=_lists_by_name(body.inner("also_true")) if body.has("also_true") else {},
            pairs=_texts_by_name(body.inner("pairs")),
        )
        for template in (relation.prompt, *relation.paraphrases, *(question.prompt for question in relation.portability)):
            if template.count("{}") != 1:
                raise RowError(f"template {template!r} of {name} holds {template.count('{}')} placeholders '{{}}'; exactly one")
        strangers = sorted(set(relation.also_true) - set(relation.pairs))
        if strangers:
            raise RowError(f"field {name}.also_true names {strangers[0]!r}, which is no subject of {name}")
    except RowError as error:
        raise DatasetError(f"{row.file}: {error}") from error
    return relation


def _texts_by_name(row: Row) -> dict[str, str]:
    return {name: row.text(name) for name in row.fields}


def _lists_by_name(row: Row) -> dict[str, tuple[str, ...]]:
    return {name: row.texts(name) for name in row.fields}


def _rows(path: Path) -> Iterator[Row | RowNote]:
    """Yield the expanded row of every pair; rows are counted over the whole file."""
    seen: dict[str, str] = {}
    pairs = ((relation, subject) for relation in read_relations(path) for subject in relation.pairs)
    for number, (relation, subject) in enumerate(pairs, start=1):
        try:
            row = relation.expand(subject)
        except RowError as error:
            yield RowNote(file=path.name, number=number, reason=str(error))
            continue
        earlier = seen.get(normalize_answer(subject))
        if earlier is not None:
            yield RowNote(file=path.name, number=number, reason=f"{row['id']}: the subject occurs already in {earlier}")
            continue
        seen[normalize_answer(subject)] = row["id"]
        yield Row(fields=row, file=path.name, number=number)


def _request(row: Row) -> EditRequest:
    """Return the request of an expanded row.

    Raises:
        RowError: too few paraphrases or neighbours, or a prompt that gives its answer away.
    """
    request = make_request(
        row,
        request_id=row.text("id"),
        prompt=row.text("prompt"),
        subject=row.text("subject"),
        target_new=row.text("target_new"),
        target_true=row.text("target_true"),
        paraphrase_prompts=row.texts("paraphrases"),
        neighborhood_prompts=_probes(row, "neighborhood"),
        portability=_probes(row, "portability"),
    )
    for kind, found, least in (
        ("paraphrases", request.paraphrase_prompts, MIN_PARAPHRASES),
        ("neighbours", request.neighborhood_prompts, MIN_NEIGHBORS),
    ):
        if len(found) < least:
            raise RowError(f"{request.request_id} has {len(found)} {kind}; at least {least}, so add some to its relation")
    for prompt in (request.full_prompt, *request.paraphrase_prompts):
        for answer in (row.text("target_true"), request.target_new):
            if contains_answer(prompt, answer):
                raise RowError(f"{request.request_id}: {prompt!r} gives the answer {answer!r} away")
    return request


def _part(subject: str) -> str:
    return "train" if seed_for("part", PART_SALT, normalize_answer(subject)) % TRAIN_SHARE == 0 else "edit"


def _probes(row: Row, name: str) -> tuple[Probe, ...]:
    return tuple(Probe(prompt=probe.text("prompt"), answer=probe.text("answer")) for probe in row.inners(name))


def _slug(subject: str) -> str:
    """Return a subject as part of an id: `the Sagrada Familia` -> `sagrada-familia`."""
    plain = "".join(character for character in unicodedata.normalize("NFKD", subject) if not unicodedata.combining(character))
    return re.sub(r"[^a-z0-9]+", "-", plain.casefold()).strip("-").removeprefix("the-")
