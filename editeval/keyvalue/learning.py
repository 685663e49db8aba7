"""How anything here is trained: rows are divided, steps read them in an order of their own, lightning makes the steps.

Importing this imports lightning, which takes seconds.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning

from editeval.types import ConfigError, EditRequest, seed_for

MOST_HELD_BACK = 100


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


def fit(module: lightning.LightningModule, steps: Any, watch: lightning.Callback, *, gradient_clip: float, device: torch.device) -> None:
    """Make the steps that `steps` yields, on a device; `watch` may end it. Nothing is logged or saved beside what `watch` does."""
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=1,
            gradient_clip_val=gradient_clip,
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
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning 2.6.6 uses what torch 2.13 calls deprecated.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
