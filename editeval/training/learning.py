"""How anything here is trained: rows are divided, steps read them in an order of their own, lightning makes the steps.

Which rows a step reads is a function of the seed and the step's number. Every so many steps the rows held back are asked, the best state is
noted, and everything is saved: training that is killed goes on from there and ends where unbroken training ends. It ends early where
nothing gets better.

Importing this imports lightning, which takes seconds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from editeval.files import write_atomic
from editeval.models.quiet import quiet
from editeval.training.settings import MOST_HELD_BACK, LearningSettings
from editeval.types import ConfigError, EditevalError, EditRequest, Progress, seed_for


class Found(Protocol):
    """What rows held back said after a step (a dataclass, so that it can be saved)."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> int:
        """After how many steps."""
        ...

    @property
    def loss(self) -> float:
        """The lower the better."""
        ...

    def text(self) -> str:
        """Return it as one line."""
        ...


Validation = TypeVar("Validation", bound=Found)


class Learner(nn.Module, Generic[Validation]):
    """What is trained: its parameters with gradients on, in the mode in which it will be used."""

    validation: type[Validation]

    def loss(self, rows: Sequence[EditRequest]) -> Tensor:
        """Return the loss of a step over these rows, with a graph."""
        raise NotImplementedError

    def validate(self, rows: Sequence[EditRequest], step: int) -> Validation:
        """Return what rows held back say."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a fresh optimizer (Adam) over everything that learns."""
        raise NotImplementedError


def divided(rows: Sequence[EditRequest], *, held_back: float, seed: int) -> tuple[list[EditRequest], list[EditRequest]]:
    """Divide rows by a hash of their subject into those to learn from and the share `held_back`, at most 100.

    Raises:
        ConfigError: one of the two would be empty.
    """
    ranked = sorted(rows, key=lambda row: (seed_for("held back", seed, row.subject), row.request_id))
    count = min(MOST_HELD_BACK, round(held_back * len(ranked)))
    subjects = {row.subject for row in ranked[:count]}
    learning = [row for row in ranked[count:] if row.subject not in subjects]
    if not count or not learning:
        raise ConfigError(
            f"of {len(rows)} training rows method.held_back={held_back} leaves {len(learning)} to learn from and {count} to validate on; "
            "at least one of each: choose a larger training set or another share"
        )
    return learning, ranked[:count]


def rows_of_step(step: int, *, rows_per_step: int, num_rows: int, seed: int) -> list[int]:
    """Return the numbers of the rows that a step (from 0) reads: epoch after epoch, each in an order of its own."""
    places = range(step * rows_per_step, (step + 1) * rows_per_step)
    orders = {
        epoch: sorted(range(num_rows), key=lambda row, epoch=epoch: seed_for("lesson", seed, epoch, row))  # type: ignore[misc]
        for epoch in {place // num_rows for place in places}
    }
    return [orders[place // num_rows][place % num_rows] for place in places]


def train(
    learner: Learner[Validation],
    learning: Sequence[EditRequest],
    held_back: Sequence[EditRequest],
    settings: LearningSettings,
    *,
    partial: Path,
    device: torch.device,
    what: str,
    progress: Progress,
) -> tuple[Validation, ...]:
    """Train in place, leave the best state in the learner, and return the validations; goes on from `partial` where it is there.

    `partial` stays until the caller has put the result away and removes it.

    Raises:
        EditevalError: the trainer was told to end by a signal.
    """
    state = _State(learner=learner)
    if partial.exists():
        state.read(partial)
        progress.message(f"{what} goes on from step {state.step} of {settings.max_steps}")
    if not state.finished(settings):
        _fit(
            _Module(state),
            _Steps(state, learning, settings, what, progress),
            _Watch(state, held_back, settings, partial, what, progress),
            settings,
            device,
        )
    if not state.finished(settings):
        raise EditevalError(
            f"{what} was interrupted at step {state.step} of {settings.max_steps}; the same command goes on from what it saved"
        )
    _put(learner, state.best)
    learner.to(device)
    return tuple(state.curve)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each tensor once (a tied one under its first name)."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(module).items():
            tensor.copy_(tensors[name])


@dataclass(kw_only=True)
class _State(Generic[Validation]):
    """All that training knows; written to and read from one file."""

    learner: Learner[Validation]
    step: int = 0
    curve: list[Validation] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stopped: bool = False

    @property
    def best_step(self) -> int:
        return min(self.curve, key=lambda found: found.loss).step if self.curve else 0

    def finished(self, settings: LearningSettings) -> bool:
        return self.stopped or self.step >= settings.max_steps

    def write(self, path: Path) -> None:
        tensors = {f"now/{name}": tensor for name, tensor in _tensors(self.learner).items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"adam/{name}/{part}": tensor for name, parts in self.moments.items() for part, tensor in parts.items()}
        about = {"step": self.step, "stopped": self.stopped, "curve": [asdict(found) for found in self.curve]}
        write_atomic(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"state": json.dumps(about)}))

    def read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["state"])
        self.step, self.stopped = about["step"], about["stopped"]
        self.curve = [self.learner.validation(**found) for found in about["curve"]]
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
        for name, tensor in load_file(path).items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        _put(self.learner, parts["now"])
        self.best = parts["best"]
        for name, tensor in parts["adam"].items():
            parameter, _, part = name.rpartition("/")
            self.moments.setdefault(parameter, {})[part] = tensor


class _Steps:
    """The rows of each step still to be made."""

    def __init__(self, state: _State[Any], rows: Sequence[EditRequest], settings: LearningSettings, what: str, progress: Progress) -> None:
        self._state = state
        self._rows = rows
        self._settings = settings
        self._what = what
        self._progress = progress

    def __iter__(self) -> Iterator[list[EditRequest]]:
        settings, steps = self._settings, range(self._state.step, self._settings.max_steps)
        for step in self._progress.track(steps, description=self._what, total=len(steps)):
            if self._state.stopped:
                return
            chosen = rows_of_step(step, rows_per_step=settings.rows_per_step, num_rows=len(self._rows), seed=settings.seed)
            yield [self._rows[row] for row in chosen]


class _Module(lightning.LightningModule):
    """The loss of a step."""

    def __init__(self, state: _State[Any]) -> None:
        super().__init__()
        self.learner = state.learner
        self._state = state

    def training_step(self, batch: Sequence[EditRequest], batch_idx: int) -> Tensor:
        """Return the loss of the step's rows."""
        return self.learner.loss(batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: it is a list of rows."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the learner's optimizer, with its moments as they were saved."""
        optimizer, named = self.learner.optimizer(), dict(self.learner.named_parameters())
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        for name, parts in self._state.moments.items():
            moved = {part: tensor.clone() if part == "step" else tensor.to(named[name].device) for part, tensor in parts.items()}
            optimizer.state[named[name]] = moved
        return optimizer


class _Watch(lightning.Callback):
    """Validates, keeps the best state, saves, stops early."""

    def __init__(
        self, state: _State[Any], held_back: Sequence[EditRequest], settings: LearningSettings, partial: Path, what: str, progress: Progress
    ) -> None:
        self._state = state
        self._held_back = held_back
        self._settings = settings
        self._partial = partial
        self._what = what
        self._progress = progress

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the step sizes, which the step's number alone decides: training that goes on takes the same steps."""
        if self._settings.anneal:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] * (1 - self._state.step / self._settings.max_steps)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step; every so many, validate and save."""
        state, settings = self._state, self._settings
        if state.stopped:
            return
        state.step += 1
        if state.step % settings.validate_every and state.step < settings.max_steps:
            return
        found = state.learner.validate(self._held_back, state.step)
        state.curve.append(found)
        self._progress.message(f"{self._what} step {state.step}: {found.text()}")
        if state.best_step == state.step:
            state.best = {name: tensor.clone() for name, tensor in _tensors(state.learner).items()}
        state.stopped = state.step - state.best_step >= settings.patience
        if state.stopped:
            self._progress.message(f"no better validation for {settings.patience} steps: training ends")
            trainer.should_stop = True
        state.moments = _moments(trainer.optimizers[0], state.learner)
        state.write(self._partial)


def _moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        parts = cast("Mapping[str, Tensor]", optimizer.state.get(parameter, {}))
        if parts:
            found[name] = {part: tensor.detach().clone() for part, tensor in parts.items()}
    return found


def _fit(
    module: lightning.LightningModule, steps: Any, watch: lightning.Callback, settings: LearningSettings, device: torch.device
) -> None:
    """Make the steps that `steps` yields, on a device; `watch` may end it. Nothing is logged or saved beside what `watch` does."""
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=1,
            gradient_clip_val=settings.gradient_clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
            plugins=[LightningEnvironment()],  # under Slurm no signal handlers of its own: the launcher has them
        )
        trainer.fit(module, train_dataloaders=steps)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the trainer's remarks on hardware and on ways to start it off the console."""
    with quiet("lightning.pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        # Lightning 2.6.6 uses what torch 2.13 calls deprecated.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        yield
