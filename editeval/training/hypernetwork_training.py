"""Training of a hypernetwork on rows whose subjects are never edited: edit, ask, learn (MEND, arXiv:2110.11309, algorithm 1).

What a step edits and asks is said by a `Course`: here each row is edited on the unedited model, and the loss is
cedit * edit loss + cloc * locality loss (see `lessons.Outcome`); in `hypernetwork_sequences` row after row is edited. See `learning`
for the steps themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from editeval.models.model import LanguageModel
from editeval.training import learning
from editeval.training.hypernetwork import Hypernetwork, NamedMap
from editeval.training.lessons import KEPT_LESSONS, Lesson, Outcome, readable
from editeval.training.settings import NetworkLearningSettings
from editeval.types import EditRequest, Progress


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Validation on rows held back, edited as the course edits: means over rows (see `lessons.Outcome`)."""

    step: int
    loss: float
    edit_loss: float
    locality_loss: float
    success: float
    generalization: float
    locality: float

    def text(self) -> str:
        """Return it as one line."""
        return (
            f"loss {self.loss:.3f} (edit {self.edit_loss:.3f}, locality {self.locality_loss:.4f}), edit success {self.success:.2f}, "
            f"paraphrases {self.generalization:.2f}, neighbours unchanged {self.locality:.2f}"
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The best network of a training, and the validations on the way to it."""

    network: Hypernetwork
    curve: tuple[Quality, ...]


def train(
    lm: LanguageModel,
    maps: Sequence[NamedMap],
    requests: Sequence[EditRequest],
    settings: NetworkLearningSettings,
    *,
    first: int,
    partial: Path,
    progress: Progress,
    make_course: Callable[..., Course],
) -> Trained:
    """Train for maps at or above layer `first`; goes on from `partial` where it is there. The model must be unedited and stays so.

    `make_course` makes, of the fields of `Course`, what says how a step edits and what is asked then.

    Raises:
        DatasetError: no row can be learned from.
        ConfigError: too few rows to hold some back.
        EditevalError: the trainer was told to end by a signal.
    """
    rows, held_back = learning.divided(readable(lm, requests), held_back=settings.held_back, seed=settings.seed)
    network = Hypernetwork(maps, rank=settings.rank, rate=settings.edit_learning_rate, seed=settings.seed, v_std=settings.v_std)
    device = lm.device_at(maps[0].path)
    course = make_course(lm=lm, sites=tuple(edited.path for edited in maps), first=first, settings=settings)
    learner = _NetworkLearner(network, course)
    curve = learning.train(learner, rows, held_back, settings, partial=partial, device=device, what="training", progress=progress)
    return Trained(network=network.eval().requires_grad_(False), curve=curve)


class _NetworkLearner(learning.Learner[Quality]):
    """A hypernetwork in training."""

    validation = Quality

    def __init__(self, network: Hypernetwork, course: Course) -> None:
        super().__init__()
        self.network = network
        self._course = course

    def loss(self, rows: Sequence[EditRequest]) -> Tensor:
        """Return the loss of a step as the course has it."""
        return self._course.step_loss(self.network, rows)

    def validate(self, rows: Sequence[EditRequest], step: int) -> Quality:
        """Return the means over rows held back."""
        return self._course.validate(self.network, rows, step)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam with a step size of its own for the edit rates."""
        settings, named = self._course.settings, dict(self.network.named_parameters())
        rates = {name: parameter for name, parameter in named.items() if name.startswith("rates.")}
        groups = [
            {"params": [parameter for name, parameter in named.items() if name not in rates], "lr": settings.learning_rate},
            {"params": list(rates.values()), "lr": settings.rate_learning_rate},
        ]
        return torch.optim.Adam(groups)


@dataclass(kw_only=True)
class Course:
    """How a step learns: here each of its rows is edited on the unedited model. Lessons are made when they are first needed."""

    lm: LanguageModel
    sites: tuple[str, ...]
    first: int
    settings: NetworkLearningSettings
    _lessons: dict[str, Lesson] = field(default_factory=dict)

    def lesson(self, request: EditRequest) -> Lesson:
        """Return the lesson of a row; the model must be unedited."""
        key = f"{request.request_id}\0{request.source_hash}"
        if key in self._lessons:
            return self._lessons[key]
        lesson = Lesson(self.lm, request, first=self.first)
        if len(self._lessons) < KEPT_LESSONS:
            self._lessons[key] = lesson
        return lesson

    def step_loss(self, network: Hypernetwork, requests: Sequence[EditRequest]) -> Tensor:
        """Return the mean loss of a step's rows; the running statistics see each row before it is edited."""
        losses = []
        for request in requests:
            lesson = self.lesson(request)
            features = lesson.features(self.sites).of_map
            network.observe(features)
            losses.append(self.weighed(lesson.outcome(network(features))))
        return torch.stack(losses).mean()

    def weighed(self, outcome: Outcome) -> Tensor:
        """Return cedit * edit loss + cloc * locality loss."""
        return self.settings.edit_weight * outcome.edit_loss + self.settings.locality_weight * outcome.locality_loss

    def outcomes(self, network: Hypernetwork, requests: Sequence[EditRequest]) -> Iterator[Outcome]:
        """Yield what the network does to rows held back, without gradients."""
        for request in requests:
            lesson = self.lesson(request)
            features = lesson.features(self.sites).of_map
            with torch.no_grad():
                yield lesson.outcome(network(features))

    def validate(self, network: Hypernetwork, requests: Sequence[EditRequest], step: int) -> Quality:
        """Return the means over rows held back."""
        columns: dict[str, list[float]] = {name: [] for name in ("edit_loss", "locality_loss", "success", "generalization", "locality")}
        for outcome in self.outcomes(network, requests):
            for name, values in columns.items():
                value = getattr(outcome, name)
                if value is not None:
                    values.append(float(value))
        means = {name: sum(values) / len(values) if values else float("nan") for name, values in columns.items()}
        loss = self.settings.edit_weight * means["edit_loss"] + self.settings.locality_weight * means["locality_loss"]
        return Quality(step=step, loss=loss, **means)
