"""The few numbers that every benchmark of ours needs beside a mean."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import TypeVar

Value = TypeVar("Value")


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error (sample deviation / sqrt(n)); no error from a single value.

    A value that is not finite (a collapsed model) makes both not finite: it is shown, not dropped.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values) if math.isfinite(mean) else math.nan
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def bootstrap_stderr(statistic: Callable[[Sequence[Value]], float], values: Sequence[Value], iters: int) -> float:
    """Return the standard deviation of a statistic over `iters` resamples of the values, the same at every call."""
    generator = random.Random(0)
    return stdev(statistic(generator.choices(values, k=len(values))) for _ in range(iters))
