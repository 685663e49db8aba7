"""Tiny models of every architecture, loaded once, and questions that share what real questions share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel

Load = Callable[..., LanguageModel]
Questions = tuple[list[str], list[str]]

CHOICES = (" in France", " Italy", " at the sea side of a distant country", " no", "?")
ODD_PAIRS = (
    ("", "hello world"),
    ("   ", "only white space before"),
    ("white space at the end ", "belongs to the continuation"),
    ("a line break at the end\n", "too"),
    ("a", " b"),
)


@pytest.fixture(scope="session")
def load_tiny(cache_dir: Path) -> Load:
    """Return a function that loads a fresh two-layer model of an architecture (a fresh one, because edits change it)."""

    def load(architecture: str, *, max_positions: int = 256, **overrides: object) -> LanguageModel:
        return TinyModel(
            name=f"tiny-{architecture}",
            architecture=architecture,
            cache_dir=cache_dir,
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            max_positions=max_positions,
            overrides=overrides,
        ).load()

    return load


@pytest.fixture(scope="session")
def questions() -> Questions:
    """Questions of three lengths with five choices each, behind a shared prefix, and pairs at the edge of the conventions."""
    contexts, continuations = [], []
    for number in range(4):
        prefix = "Answer the question. The capital of France is Paris. " * (number % 3 + 1)
        for choice in CHOICES:
            contexts.append(f"{prefix}Question {number}: where is town {number * 37}?")
            continuations.append(choice)
    return [*contexts, *(pair[0] for pair in ODD_PAIRS)], [*continuations, *(pair[1] for pair in ODD_PAIRS)]


def cast_parameters(lm: LanguageModel, dtype: torch.dtype) -> None:
    """Round a model's parameters to another type, in place."""
    for parameter in lm.module.parameters():
        parameter.data = parameter.data.to(dtype)
