"""A memory of edited facts, and the rule that decides which of them, if any, a request is about.

The rule: a request is about the facts whose prompts are nearest to it in meaning, the cosine of two sentence embeddings, if that is at
least the threshold. A request may be long (examples before a question) or begin with other matter, so it is looked at in two ways, whole
and its last sentence alone, and the better one counts.

What is looked up is kept in step with the facts, so that beside one matrix product neither a request nor an edit grows with their number.

Shapes: N facts, Q requests, D the encoder's width.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editeval.edits.delta import AdapterDelta, MemoryDelta
from editeval.inference.adapters import Route
from editeval.memory.encoder import SentenceEncoder
from editeval.types import EditError

FEWEST_WORDS = 4  # of a last sentence; a shorter one ("Answer:") is taken with what stands before it


@dataclass(frozen=True, kw_only=True, eq=False)
class Fact:
    """An edited fact: full prompt, subject and target as text, the prompt's embedding (D), and what shows how to use it."""

    prompt: str
    subject: str
    target: str
    embedding: Tensor
    demonstrations: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """The fact as a sentence."""
        return f"{self.prompt.rstrip()} {self.target}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Hit:
    """A fact that a request is near to, and how near (the cosine)."""

    fact: Fact
    similarity: float


class MemoryAdapter(ABC):
    """The facts that edits wrote (a `RequestAdapter` but for its routes); of two facts with one prompt the later one counts.

    A request is about at most `count` facts, each with a cosine of at least `similarity`.
    """

    def __init__(self, encoder: SentenceEncoder, *, similarity: float, count: int) -> None:
        self.encoder = encoder
        self.similarity = similarity
        self._count = count
        self.clear()

    @property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact, in the order of the edits."""
        return tuple(self._facts)

    @property
    def is_empty(self) -> bool:
        """Whether there is no fact."""
        return not self._facts

    def check(self, deltas: Sequence[AdapterDelta]) -> None:
        """Raise what `add` would raise, and change nothing."""
        self._new(deltas)

    def add(self, deltas: Sequence[AdapterDelta]) -> None:
        """Take in the facts of the deltas; see `Adapter.add`."""
        for fact in self._new(deltas):
            self._facts.append(fact)
            self._hash.update(_digest(fact))
            self._make_current(fact)

    def clear(self) -> None:
        """Forget every fact."""
        self._facts: list[Fact] = []
        self._hash = hashlib.sha256()
        self._current: list[Fact] = []  # the last fact of each prompt, in the order in which the prompts came
        self._rows: dict[str, int] = {}  # of the prompts there
        self._room = torch.empty(0, self.encoder.width, dtype=torch.float64)  # their embeddings, and rows for more

    def digest(self) -> str:
        """Return the sha256 over every fact's own, in order."""
        return self._hash.hexdigest()

    def snapshot(self) -> tuple[MemoryDelta, ...]:
        """Return one delta with every fact."""
        return (memory_delta(self._facts),) if self._facts else ()

    @abstractmethod
    def routes(self, requests: Sequence[str]) -> Sequence[Route | None]:
        """Return each request's route."""

    def about(self, requests: Sequence[str]) -> list[tuple[Hit, ...]]:
        """Return the facts that each request is about, the nearest first."""
        found = self.nearest(requests, count=self._count)
        return [tuple(hit for hit in hits if hit.similarity >= self.similarity) for hits in found]

    def nearest(self, requests: Sequence[str], *, count: int) -> list[tuple[Hit, ...]]:
        """Return the `count` facts nearest to each request, the nearest first; one matrix product for all requests."""
        if self.is_empty or not requests:
            return [()] * len(requests)
        current, keys_ND = self._current, self._room[: len(self._current)]
        views = [*requests, *(last_sentence(request) for request in requests)]
        # In float64 the product of a row does not notice its neighbours in any digit that a decision could hang on.
        whole_QN, last_QN = (self.encoder.encode(views).double() @ keys_ND.T).chunk(2)
        best_QN = torch.maximum(whole_QN, last_QN)
        found = best_QN.topk(min(count, len(current)), dim=1)
        return [
            tuple(Hit(fact=current[number], similarity=value) for value, number in zip(values, numbers, strict=True))
            for values, numbers in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]

    def _make_current(self, fact: Fact) -> None:
        """Put a fact where requests are compared, in place of an earlier one with its prompt."""
        row = self._rows.setdefault(fact.prompt, len(self._current))
        self._current[row : row + 1] = [fact]
        with torch.inference_mode(mode=False), torch.no_grad():
            if row == len(self._room):  # twice the rows, so that copying them costs each fact the same, whatever their number
                self._room = torch.cat([self._room, torch.empty(max(1, row), self.encoder.width, dtype=torch.float64)])
            self._room[row] = fact.embedding

    def _new(self, deltas: Sequence[AdapterDelta]) -> list[Fact]:
        """Return the facts of the deltas, checked; nothing is changed."""
        facts: list[Fact] = []
        for delta in deltas:
            if not isinstance(delta, MemoryDelta):
                raise EditError(f"a {type(delta).__name__} is no fact of a memory; replay it with the method that made it")
            wanted = (len(delta.prompts), self.encoder.width)
            if tuple(delta.embeddings.shape) != wanted or not bool(torch.isfinite(delta.embeddings).all()):
                raise EditError(
                    f"embeddings of {wanted[0]} facts are {tuple(delta.embeddings.shape)}, expected finite numbers of shape {wanted}; "
                    "choose the encoder that the edit was made with (method.encoder)"
                )
            facts += _facts(delta)
        if all(fact.prompt in self._rows and self._current[self._rows[fact.prompt]].target == fact.target for fact in facts):
            raise EditError("the memory holds every fact of this edit already; an edit must change the model")
        return facts


def last_sentence(text: str) -> str:
    """Return the end of a text from its last sentence or line on, or from an earlier one where that has fewer than four words."""
    text = text.strip()
    for start in reversed([match.end() for match in re.finditer(r"[.!?]\s+|\n+", text)]):
        if len(text[start:].split()) >= FEWEST_WORDS:
            return text[start:]
    return text


def memory_delta(facts: Sequence[Fact]) -> MemoryDelta:
    """Return the delta that adds these facts."""
    return MemoryDelta(
        prompts=tuple(fact.prompt for fact in facts),
        subjects=tuple(fact.subject for fact in facts),
        targets=tuple(fact.target for fact in facts),
        demonstrations=tuple(fact.demonstrations for fact in facts),
        embeddings=torch.stack([fact.embedding for fact in facts]).float(),
    )


def _facts(delta: MemoryDelta) -> list[Fact]:
    return [
        Fact(prompt=prompt, subject=subject, target=target, demonstrations=shown, embedding=embedding)
        for prompt, subject, target, shown, embedding in zip(
            delta.prompts, delta.subjects, delta.targets, delta.demonstrations, delta.embeddings, strict=True
        )
    ]


def _digest(fact: Fact) -> bytes:
    texts = repr((fact.prompt, fact.subject, fact.target, fact.demonstrations))
    return hashlib.sha256(texts.encode() + fact.embedding.contiguous().view(torch.uint8).numpy().tobytes()).digest()
