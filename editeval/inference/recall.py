"""What is done once and serves every rung: requests as tokens in rows, and what the unedited model answered.

Along a trajectory the same requests come again and again. Their tokens and rows do not depend on the weights; and where edits stand beside
the weights, neither do the answers to requests that no edit reaches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.adapters import Around, ObservableAdapter, PromptPath

Value = TypeVar("Value")

BUDGET_BYTES = 1 << 28  # of each store


class Remembered(Generic[Value]):
    """A store of at most `budget` bytes: what was not asked for longest goes first. What alone is larger is not kept."""

    def __init__(self, size_of: Callable[[Value], int], *, budget: int = BUDGET_BYTES) -> None:
        self._size_of = size_of
        self._budget = budget
        self._used = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """Return what was put there, if it is still known."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value) -> Value:
        """Keep and return a value, in place of what was there."""
        size = self._size_of(value)
        self._used -= self._values.pop(key, (value, 0))[1]
        if size <= self._budget:
            self._used += size
            self._values[key] = value, size
        while self._used > self._budget:
            _, (_, freed) = self._values.popitem(last=False)
            self._used -= freed
        return value


@dataclass(frozen=True, kw_only=True)
class BaseAnswers:
    """What the unedited model answered to a call, and what an adapter saw there: (P, D), empty where nothing is looked at."""

    answers: tuple[object, ...]
    seen: Tensor

    @property
    def nbytes(self) -> int:
        """About how much memory this takes."""
        return sum(len(answer) if isinstance(answer, str) else 500 for answer in self.answers) + self.seen.nbytes


class Recorder(Around):
    """An adapter in a pass, if it holds anything, and a note of what it sees there."""

    def __init__(self, adapter: ObservableAdapter, *, acts: bool) -> None:
        super().__init__(adapter)
        self._adapter = adapter
        self._acts = acts
        self._seen: list[Tensor] = []

    @property
    def every_step(self) -> bool:
        """False: what is observed stands where prompts end."""
        return False

    @contextmanager
    def active(self, module: PreTrainedModel, prompts: Sequence[PromptPath]) -> Iterator[None]:
        """Within the context the adapter acts, and what it sees is noted."""
        with self._adapter.observing(module, prompts, self._seen), super().active(module, prompts) if self._acts else nullcontext():
            yield

    @property
    def seen(self) -> Tensor:
        """What was seen since the recorder was made: (P, D)."""
        return torch.cat(self._seen) if self._seen else torch.empty(0, 0)

    def reached(self, seen: Tensor) -> bool:
        """Return whether an edit acts on any of what was seen."""
        return self._acts and len(seen) > 0 and self._adapter.reaches(seen)
