"""What a method with a memory learns: a classifier, a model that reads. The steps are those of `training.learning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from editeval.training import learning
from editeval.training.settings import LearningSettings
from editeval.types import EditRequest, Progress


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What the rows held back said after a step: the loss (nats), and shares by name."""

    step: int
    loss: float
    shares: dict[str, float]

    def text(self) -> str:
        """Return it as one line."""
        return f"loss {self.loss:.3f}, " + ", ".join(f"{name} {value:.2f}" for name, value in self.shares.items())


class Learner(learning.Learner[Validation]):
    """What is trained, by Adam with one step size."""

    validation = Validation
    learning_rate: float

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam over everything that learns."""
        return torch.optim.Adam([parameter for parameter in self.parameters() if parameter.requires_grad], lr=self.learning_rate)


def train(
    learner: Learner,
    learned: Sequence[EditRequest],
    held_back: Sequence[EditRequest],
    settings: LearningSettings,
    *,
    partial: Path,
    device: torch.device,
    what: str,
    progress: Progress,
) -> tuple[Validation, ...]:
    """Train in place, leave the best state in the learner, and return the validations; goes on from `partial` where it is there.

    Raises:
        EditevalError: the trainer was told to end by a signal.
    """
    learner.learning_rate = settings.learning_rate
    return learning.train(learner, learned, held_back, settings, partial=partial, device=device, what=what, progress=progress)
