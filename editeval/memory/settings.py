"""How long and how fast something is trained; apart from the loop, because that imports lightning, which takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

from editeval.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """Adam's step size, steps and their rows, how often to validate, and after how many steps without a better loss to end.

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

    def __post_init__(self) -> None:
        for name in ("learning_rate", "gradient_clip", "max_steps", "rows_per_step", "validate_every", "patience"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be above 0")
        if not 0 < self.held_back < 1:
            raise ConfigError(f"method.held_back={self.held_back} must be a share of the training rows between 0 and 1")
