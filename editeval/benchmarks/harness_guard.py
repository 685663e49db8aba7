"""Running the harness's code so that it leaves nothing behind: global random state, log noise, functions set aside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from editeval.models.quiet import quiet


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """An attribute of a foreign module that is another one for a while."""

    owner: Any
    name: str
    value: Any


@contextmanager
def guarded(seed: int, replacements: Sequence[Replacement]) -> Iterator[None]:
    """Start from the same global random state each time, quietly; afterwards everything is as it was."""
    with ExitStack() as stack:
        stack.enter_context(_random_state(seed))
        stack.enter_context(quiet("lm_eval"))
        for replacement in replacements:
            stack.enter_context(_replaced(replacement))
        yield


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seed the global generators of python, numpy and torch, and give each its own state back."""
    import numpy
    import torch

    python_state = random.getstate()
    numpy_state = numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def _replaced(replacement: Replacement) -> Iterator[None]:
    before = getattr(replacement.owner, replacement.name)
    setattr(replacement.owner, replacement.name, replacement.value)
    try:
        yield
    finally:
        setattr(replacement.owner, replacement.name, before)
