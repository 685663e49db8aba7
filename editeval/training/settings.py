"""How long and how fast something is trained; apart from the loop, because that imports lightning, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from editeval.datasets.training import TrainingSet
from editeval.types import ConfigError

MOST_HELD_BACK = 100  # rows to validate on, whatever the share

S = TypeVar("S", bound="LearningSettings")


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """Adam's step size, steps and their rows, how often to validate, and after how many steps without a better loss to end.

    `gradient_clip` is the largest norm of a step's gradient, `held_back` the share of the rows to validate on, `seed` that of the order
    of rows. With `anneal` step sizes fall linearly, to nothing at `max_steps`.

    Raises:
        ConfigError: a number that cannot be.
    """

    learning_rate: float
    gradient_clip: float
    max_steps: int
    rows_per_step: int
    validate_every: int
    patience: int
    held_back: float
    seed: int
    anneal: bool = False

    def as_key(self) -> Mapping[str, Any]:
        """Return what trained parts are kept by; what was trained before there was `anneal` is still found."""
        return {name: value for name, value in asdict(self).items() if name != "anneal" or value}

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows_per_step", "validate_every", "patience"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be above 0")
        if not 0 < self.held_back < 1:
            raise ConfigError(f"method.held_back={self.held_back} must be a share of the training rows between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class NetworkLearningSettings(LearningSettings):
    """How a hypernetwork is made and learns: its rank, what V and the learned rates start from, the rates' step size, the losses' weights.

    `v_std` is the standard deviation of V's elements in the beginning; None: 1 / sqrt(their number in a row).

    Raises:
        ConfigError: a number that cannot be.
    """

    rank: int
    v_std: float | None
    edit_learning_rate: float
    rate_learning_rate: float
    edit_weight: float
    locality_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rank >= 1:
            raise ConfigError(f"method.rank={self.rank} must be at least 1")
        if self.v_std is not None and not self.v_std > 0:
            raise ConfigError(f"method.v_std={self.v_std} must be above 0, or null: 1 / sqrt(width)")
        for name in ("edit_learning_rate", "rate_learning_rate", "edit_weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be above 0")
        if not self.locality_weight >= 0:
            raise ConfigError(f"method.locality_weight={self.locality_weight} must not be negative")


@dataclass(frozen=True, kw_only=True)
class LearnsBeforehand:
    """The fields of every method that is trained before its first edit, as they stand in its YAML.

    `training_seed` is the `seed` of `LearningSettings`. `training` are the rows that it learns from; `archive` holds what was trained
    elsewhere, to be used instead; None: it is trained, or found in the cache.
    """

    name: str
    learning_rate: float
    gradient_clip: float
    max_steps: int
    rows_per_step: int
    validate_every: int
    patience: int
    held_back: float
    training_seed: int
    training: TrainingSet
    archive: str | None
    anneal: bool = False

    def learning_as(self, kind: type[S]) -> S:
        """Return the fields that `kind` has, checked.

        Raises:
            ConfigError: a number that cannot be.
        """
        names = (name for name in kind.__dataclass_fields__ if name != "seed")
        return kind(**{name: getattr(self, name) for name in names}, seed=self.training_seed)
