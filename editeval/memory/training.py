"""The training loop of what a method with a memory learns: a classifier, a model that reads. Lightning makes the steps.

Which rows a step sees is a function of the seed and the step's number. Every so many steps the rows held back are asked; the best state
is kept, and training ends early where nothing gets better.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from editeval.keyvalue.learning import divided, fit, rows_of_step
from editeval.memory.settings import LearningSettings
from editeval.types import EditevalError, EditRequest, Progress


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What the rows held back said after a step: the loss (nats), and shares by name."""

    step: int
    loss: float
    shares: dict[str, float]

    def text(self) -> str:
        """Return it as one line."""
        return f"loss {self.loss:.3f}, " + ", ".join(f"{name} {value:.2f}" for name, value in self.shares.items())


class Learner(nn.Module):
    """What is trained: its parameters with gradients on, in the mode in which it will be used."""

    @abstractmethod
    def loss(self, rows: Sequence[EditRequest]) -> Tensor:
        """Return the loss of a step over these rows, with a graph."""

    @abstractmethod
    def validate(self, rows: Sequence[EditRequest], step: int) -> Validation:
        """Return what rows held back say."""


def train(
    learner: Learner, rows: Sequence[EditRequest], settings: LearningSettings, *, device: torch.device, what: str, progress: Progress
) -> tuple[Validation, ...]:
    """Train in place, leave the best state in the learner, and return the validations.

    Raises:
        ConfigError: too few rows to hold some back.
        EditevalError: the trainer was told to end by a signal.
    """
    learning, held_back = divided(rows, held_back=settings.held_back, seed=settings.seed)
    watch = _Watch(learner, held_back, settings, what, progress)
    steps = _Steps(learning, settings, watch, what, progress)
    fit(_Module(learner, settings), steps, watch, gradient_clip=settings.gradient_clip, device=device)
    if not watch.finished:
        raise EditevalError(f"training of the {what} was interrupted; the same command begins it again")
    learner.load_state_dict(watch.best)
    learner.to(device)
    return tuple(watch.curve)


class _Steps:
    """The rows of each step."""

    def __init__(self, rows: Sequence[EditRequest], settings: LearningSettings, watch: _Watch, what: str, progress: Progress) -> None:
        self._rows = rows
        self._settings = settings
        self._watch = watch
        self._what = what
        self._progress = progress

    def __iter__(self) -> Iterator[list[EditRequest]]:
        size, seed = self._settings.rows_per_step, self._settings.seed
        for step in self._progress.track(range(self._settings.max_steps), description=self._what, total=self._settings.max_steps):
            if self._watch.finished:
                return
            yield [self._rows[row] for row in rows_of_step(step, rows_per_step=size, num_rows=len(self._rows), seed=seed)]


class _Module(lightning.LightningModule):
    """The loss of a step."""

    def __init__(self, learner: Learner, settings: LearningSettings) -> None:
        super().__init__()
        self.learner = learner
        self._settings = settings

    def training_step(self, batch: Sequence[EditRequest], batch_idx: int) -> Tensor:
        """Return the loss of the step's rows."""
        return self.learner.loss(batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: it is a list of rows."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over everything that learns."""
        return torch.optim.Adam([parameter for parameter in self.parameters() if parameter.requires_grad], lr=self._settings.learning_rate)


class _Watch(lightning.Callback):
    """Validates, keeps the best state, stops early."""

    def __init__(
        self, learner: Learner, held_back: Sequence[EditRequest], settings: LearningSettings, what: str, progress: Progress
    ) -> None:
        self.curve: list[Validation] = []
        self.best: dict[str, Tensor] = {}
        self.finished = False
        self._step = 0
        self._learner = learner
        self._held_back = held_back
        self._settings = settings
        self._what = what
        self._progress = progress

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step; every so many, validate."""
        self._step += 1
        last = self._step == self._settings.max_steps
        if self.finished or (self._step % self._settings.validate_every and not last):
            return
        found = self._learner.validate(self._held_back, self._step)
        self.curve.append(found)
        self._progress.message(f"{self._what}, step {self._step}: {found.text()}")
        best = min(self.curve, key=lambda validation: validation.loss)
        if best is found:
            self.best = {name: tensor.detach().clone() for name, tensor in self._learner.state_dict().items()}
        if last or self._step - best.step >= self._settings.patience:
            self.finished = True
            trainer.should_stop = True
