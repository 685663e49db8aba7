"""Training of a hypernetwork on rows whose subjects are never edited: edit, ask, learn (MEND, arXiv:2110.11309, algorithm 1).

What a step edits and asks is said by a `Course`: here each row is edited on the unedited model, and the loss is
cedit * edit loss + cloc * locality loss (see `lessons.Outcome`); in `hypernetwork_sequences` row after row is edited. Everything that a
step depends on is a function of the seed and the step's number, and all state is saved at each validation: training that is killed goes on
from there and ends where unbroken training ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.files import write_atomic
from editeval.keyvalue.hypernetwork import EditedMap, Hypernetwork, LearningSettings
from editeval.keyvalue.learning import divided, fit, rows_of_step
from editeval.keyvalue.lessons import Lesson, Outcome, readable
from editeval.models.model import LanguageModel
from editeval.types import EditevalError, EditRequest, Progress

KEPT_LESSONS = 1000  # what stands before the edited layers is kept of so many rows; of more it is computed again


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
    maps: Sequence[EditedMap],
    requests: Sequence[EditRequest],
    settings: LearningSettings,
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
    learning, held_back = divided(readable(lm, requests), held_back=settings.held_back, seed=settings.seed)
    network = Hypernetwork(maps, rank=settings.rank, rate=settings.edit_learning_rate, seed=settings.seed)
    device = lm.device_of(lm.module.get_submodule(maps[0].path))
    course = make_course(lm=lm, learning=learning, sites=tuple(edited.path for edited in maps), first=first, settings=settings)
    state = _State(network=network)
    if partial.exists():
        state.read(partial)
        progress.message(f"training goes on from step {state.step} of {settings.max_steps}")
    module = _Module(course, state)
    watch = _Watch(state, course, held_back, partial, progress)
    if not state.finished(settings):
        fit(module, _Steps(state, settings, len(learning), progress), watch, gradient_clip=settings.gradient_clip, device=device)
    if not state.finished(settings):
        raise EditevalError(
            f"training was interrupted at step {state.step} of {settings.max_steps}; the same command goes on from what it saved"
        )
    network.load_state_dict(state.best)
    return Trained(network=network.to(device).eval().requires_grad_(False), curve=tuple(state.curve))


@dataclass(kw_only=True)
class Course:
    """How a step learns: here each of its rows is edited on the unedited model. Lessons are made when they are first needed."""

    lm: LanguageModel
    learning: Sequence[EditRequest]
    sites: tuple[str, ...]
    first: int
    settings: LearningSettings
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


@dataclass(kw_only=True)
class _State:
    """All that training knows; written to and read from one file."""

    network: Hypernetwork
    step: int = 0
    curve: list[Quality] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stopped: bool = False

    @property
    def best_step(self) -> int:
        return min(self.curve, key=lambda quality: quality.loss).step if self.curve else 0

    def finished(self, settings: LearningSettings) -> bool:
        return self.stopped or self.step >= settings.max_steps

    def write(self, path: Path) -> None:
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"adam/{name}/{part}": tensor for name, parts in self.moments.items() for part, tensor in parts.items()}
        about = {"step": self.step, "stopped": self.stopped, "curve": [asdict(quality) for quality in self.curve]}
        write_atomic(
            path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"state": json.dumps(about)})
        )

    def read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["state"])
        self.step, self.stopped = about["step"], about["stopped"]
        self.curve = [Quality(**quality) for quality in about["curve"]]
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "adam": {}}
        for name, tensor in load_file(path).items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        self.network.load_state_dict(parts["network"])
        self.best = parts["best"]
        for name, tensor in parts["adam"].items():
            parameter, _, part = name.rpartition("/")
            self.moments.setdefault(parameter, {})[part] = tensor


class _Steps:
    """The rows of each step still to be made, as indices: a function of the seed and the step's number."""

    def __init__(self, state: _State, settings: LearningSettings, num_rows: int, progress: Progress) -> None:
        self._state = state
        self._settings = settings
        self._num_rows = num_rows
        self._progress = progress

    def __iter__(self) -> Iterator[list[int]]:
        steps = range(self._state.step, self._settings.max_steps)
        for step in self._progress.track(steps, description="training", total=len(steps)):
            if self._state.stopped:
                return
            yield rows_of_step(step, rows_per_step=self._settings.rows_per_step, num_rows=self._num_rows, seed=self._settings.seed)


class _Module(lightning.LightningModule):
    """The loss of a step."""

    def __init__(self, course: Course, state: _State) -> None:
        super().__init__()
        self.network = state.network
        self._course = course
        self._state = state

    def training_step(self, batch: Sequence[int], batch_idx: int) -> Tensor:
        """Return the loss of the step."""
        return self._course.step_loss(self.network, [self._course.learning[row] for row in batch])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: it is a list of row numbers."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with a step size of its own for the edit rates, with its moments as they were saved."""
        settings = self._course.settings
        named = dict(self.network.named_parameters())
        rates = {name: parameter for name, parameter in named.items() if name.startswith("rates.")}
        groups = [
            {"params": [parameter for name, parameter in named.items() if name not in rates], "lr": settings.learning_rate},
            {"params": list(rates.values()), "lr": settings.rate_learning_rate},
        ]
        optimizer = torch.optim.Adam(groups)
        for name, parts in self._state.moments.items():
            moved = {part: tensor.clone() if part == "step" else tensor.to(named[name].device) for part, tensor in parts.items()}
            optimizer.state[named[name]] = moved
        return optimizer


class _Watch(lightning.Callback):
    """Validates, keeps the best network, saves, stops early."""

    def __init__(self, state: _State, course: Course, held_back: Sequence[EditRequest], partial: Path, progress: Progress) -> None:
        self._state = state
        self._course = course
        self._held_back = held_back
        self._partial = partial
        self._progress = progress

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step; every so many, validate and save."""
        state, settings = self._state, self._course.settings
        if state.stopped:
            return
        state.step += 1
        if state.step % settings.validate_every and state.step < settings.max_steps:
            return
        quality = self._course.validate(state.network, self._held_back, state.step)
        state.curve.append(quality)
        self._progress.message(f"training step {state.step}: {quality.text()}")
        if state.best_step == state.step:
            state.best = {name: tensor.detach().clone() for name, tensor in state.network.state_dict().items()}
        state.stopped = state.step - state.best_step >= settings.patience
        if state.stopped:
            self._progress.message(f"no better validation for {settings.patience} steps: training ends")
            trainer.should_stop = True
        state.moments = _moments(trainer.optimizers[0], state.network)
        state.write(self._partial)


def _moments(optimizer: torch.optim.Optimizer, network: Hypernetwork) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in network.named_parameters():
        parts: Mapping[str, Tensor] = optimizer.state.get(parameter, {})
        if parts:
            found[name] = {part: tensor.detach().clone() for part, tensor in parts.items()}
    return found
