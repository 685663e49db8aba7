"""A number with its interval, and the interval of a share. Needs no scipy: every run's own page draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from editeval.types import Score

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with its two-sided interval of `CONFIDENCE`; infinite where the data bound nothing."""

    value: float
    low: float
    high: float


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of the normal distribution: 1.96 for 95%."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(successes: float, n: float, *, quantile: float | None = None) -> Interval:
    """Return a share with Wilson's score interval (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    `n` may be an effective number of trials; `quantile` is the normal one unless it is given.

    Raises:
        ValueError: no trials.
    """
    if n <= 0:
        raise ValueError("a share needs at least one trial")
    z, share = normal_quantile() if quantile is None else quantile, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def share_interval(share: float, *, variance: float, n: float, quantile: float | None = None) -> Interval:
    """Return Wilson's interval of a share that was measured with this variance on `n` items.

    The trials are as many as would vary as much (the effective sample size, which counts in graded items and orders of edits); `n`
    where nothing varied: that none of 20 items was right does not prove that none ever is.
    """
    trials = share * (1 - share) / variance if variance > 0 and 0 < share < 1 else n
    found = wilson(share * trials, trials, quantile=quantile)
    return Interval(value=share, low=min(share, found.low), high=max(share, found.high))


def score_interval(score: Score, *, is_share: bool) -> Interval:
    """Return a score with its interval over items: Wilson's of a share, else by its standard error; the number alone where it has none."""
    if is_share and math.isfinite(score.value):
        return share_interval(score.value, variance=share_variance(score), n=score.n)
    if score.stderr is None or not math.isfinite(score.stderr) or not math.isfinite(score.value):
        return Interval(value=score.value, low=score.value, high=score.value)
    half = normal_quantile() * score.stderr
    return Interval(value=score.value, low=score.value - half, high=score.value + half)


def share_variance(score: Score) -> float:
    """Return the variance of a share over its items: p (1 - p) / n where it has no error of its own, which no share exceeds.

    lm-eval gives none to a mean over tasks that have one item each.
    """
    if score.stderr is None or not math.isfinite(score.stderr):
        return score.value * (1 - score.value) / score.n
    return score.stderr**2
