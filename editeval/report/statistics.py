"""The statistics of a study: paired over items, with intervals that also count in the orders of the edits.

Retained ability, the quantity of every question, is r = (s_n - chance) / (s_0 - chance): the share of what the unedited model
can do beyond guessing that is left after n edits. Items are asked of both models, so r is a ratio of paired means:

- one r alone gets Fieller's interval (Fieller 1954, https://doi.org/10.1111/j.2517-6161.1954.tb00159.x), which is unbounded
  exactly where the unedited model is not above chance;
- sums of r (means over benchmarks, areas under curves, differences of differences) get the delta method: each item's
  influence on r is kept, so that two models asked the same items are compared item by item.

Items and orders of edits are two crossed samples. The variance of a mean over K orders is taken as (variance between items) / N
+ (variance between orders) / K, with the degrees of freedom of Satterthwaite 1946, https://doi.org/10.2307/3002019.

Shapes: N items, K orders of edits, B resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from editeval.report.intervals import CONFIDENCE, Interval, normal_quantile, share_interval

Array = NDArray[np.float64]


# -- paired tests ----------------------------------------------------------------------------------------------------------


def mcnemar(before: Array, after: Array) -> float:
    """Return the exact two-sided p-value of McNemar's test on right (1) and wrong (0) answers of the same items, (N,) each.

    Under no effect an item that changes is as likely lost as gained: binomial with 1/2 over the items that changed
    (McNemar 1947, https://doi.org/10.1007/BF02295996).
    """
    lost, gained = int(np.sum((before == 1) & (after == 0))), int(np.sum((before == 0) & (after == 1)))
    changed = lost + gained
    return min(1.0, 2 * float(stats.binom.cdf(min(lost, gained), changed, 0.5))) if changed else 1.0


def paired_bootstrap(before: Array, after: Array, *, seed: int, resamples: int = 4000) -> tuple[Interval, float]:
    """Return the mean of after - before, (N,) each, with its percentile interval, and a two-sided p-value.

    The p-value is twice the smaller share of resampled means on one side of zero, at least 2 / (B + 1) (Davison and Hinkley
    1997, section 4.4): for scores that are no mere right and wrong.

    Raises:
        ValueError: fewer than two items.
    """
    difference = np.asarray(after, float) - np.asarray(before, float)
    if len(difference) < 2:
        raise ValueError(f"a bootstrap needs at least 2 items; got {len(difference)}")
    random = np.random.default_rng(seed)
    means_B = np.concatenate(
        [difference[random.integers(0, len(difference), (part, len(difference)))].mean(1) for part in _parts(resamples)]
    )
    low, high = np.quantile(means_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    one_side = min(int(np.sum(means_B <= 0)), int(np.sum(means_B >= 0)))
    p_value = min(1.0, 2 * (one_side + 1) / (resamples + 1))
    return Interval(value=float(difference.mean()), low=float(low), high=float(high)), p_value


def _parts(total: int, size: int = 500) -> Iterable[int]:
    return (min(size, total - start) for start in range(0, total, size))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p-values adjusted for their number, in the given order (Holm 1979, step down)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return tuple(adjusted)


# -- estimates -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number, and what it owes to each item and to each order of edits.

    `pools` maps a set of items to each item's influence, (N,): the variance over items is that of its mean. Estimates on the same
    pool are compared item by item. `orders`, (K,), is the number under each order of edits. `extra_variance` is what is known of
    the variance beside the items.
    """

    value: float
    pools: Mapping[str, Array] = field(default_factory=dict)
    orders: tuple[float, ...] = ()
    extra_variance: float = 0.0

    @property
    def item_variance(self) -> float:
        """Variance of the number over draws of the items."""
        return self.extra_variance + sum(variance_of_mean(pool) for pool in self.pools.values())

    @property
    def order_variance(self) -> float:
        """Variance of the number over draws of the orders; 0 where there is one order, which tells nothing about others."""
        return variance_of_mean(np.asarray(self.orders, float))

    @property
    def variance(self) -> float:
        """Variance of the number."""
        return self.item_variance + self.order_variance

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the number with its two-sided t interval."""
        half = self.quantile(confidence) * math.sqrt(self.variance)
        return Interval(value=self.value, low=self.value - half, high=self.value + half)

    def p_value(self) -> float:
        """Return the two-sided p-value of the number being zero, by the t of `interval`: below 0.05 where that leaves zero out."""
        if self.variance == 0:
            return 1.0 if self.value == 0 else 0.0
        return min(1.0, 2 * float(stats.t.sf(abs(self.value) / math.sqrt(self.variance), self._freedom)))

    def quantile(self, confidence: float = CONFIDENCE) -> float:
        """Return the two-sided quantile of t with Satterthwaite's degrees of freedom."""
        return float(special.stdtrit(self._freedom, (1 + confidence) / 2)) if math.isfinite(self._freedom) else normal_quantile(confidence)

    @property
    def _freedom(self) -> float:
        freedom = max((len(pool) for pool in self.pools.values()), default=0) - 1
        parts = [(self.item_variance, freedom if freedom > 0 else math.inf), (self.order_variance, len(self.orders) - 1)]
        total = sum(part for part, _ in parts)
        weight = sum(part * part / degrees for part, degrees in parts if part > 0 and degrees > 0)
        return total * total / weight if weight > 0 else math.inf


def share_over_orders(share: float, orders: Sequence[float], n: float) -> Interval:
    """Return a share of n items with Wilson's interval over items and over orders of edits, (K,), each of which has a share of its own.

    Where orders differ the items count for fewer: for as many as would vary as much as items and orders together (the effective sample
    size), with the quantile of t, as for every other number.
    """
    estimate = Estimate(value=share, orders=tuple(orders), extra_variance=share * (1 - share) / n)
    return share_interval(share, variance=estimate.variance, n=n, quantile=estimate.quantile())


def combine(terms: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return the weighted sum of estimates: paired where they share a pool of items, independent where they do not.

    Orders go together by place; where the numbers of orders differ, only the first ones that all have do.

    Raises:
        ValueError: nothing to add, or two estimates of the same pool with different numbers of items.
    """
    if not terms:
        raise ValueError("a combination needs at least one estimate")
    pools: dict[str, Array] = {}
    for weight, estimate in terms:
        for name, influence in estimate.pools.items():
            if name in pools and len(pools[name]) != len(influence):
                raise ValueError(f"items of {name}: {len(pools[name])} and {len(influence)}; estimates of one pool need the same items")
            pools[name] = pools.get(name, 0.0) + weight * influence
    orders = zip(*([weight * order for order in estimate.orders] for weight, estimate in terms), strict=False)
    return Estimate(
        value=sum(weight * estimate.value for weight, estimate in terms),
        pools=pools,
        orders=tuple(sum(order) for order in orders),
        extra_variance=sum(weight * weight * estimate.extra_variance for weight, estimate in terms),
    )


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A ratio's numerator x and denominator y with their variances, those of means, and their covariance."""

    numerator: float
    denominator: float
    var_top: float
    var_bottom: float
    covariance: float


@dataclass(frozen=True, kw_only=True)
class Retained:
    """Retained ability: what Fieller's interval needs, and the estimate for sums. `can_show_damage` is whether s_0 is above chance."""

    moments: Moments
    estimate: Estimate
    can_show_damage: bool

    @cached_property
    def interval(self) -> Interval:
        """Fieller's interval."""
        return self.at(CONFIDENCE)

    def at(self, confidence: float) -> Interval:
        """Return Fieller's interval of a confidence."""
        return fieller(self.moments, quantile=self.estimate.quantile(confidence))


def retained(before_N: Array, after_KN: Array, *, chance: float, pool: str) -> Retained:
    """Return r of items answered before, (N,), and after the edits under each order, (K, N).

    Where every item is right or wrong, the variance has in it two more pairs, one lost and one gained (as in Bonett and Price
    2012, https://doi.org/10.3102/1076998611411915): that no item of a few changed does not prove that none ever would.

    Raises:
        ValueError: fewer than two items.
    """
    before, after = np.asarray(before_N, float), np.asarray(after_KN, float)
    if len(before) < 2:
        raise ValueError(f"retained ability needs at least 2 items; got {len(before)}")
    mean_after = after.mean(0)
    numerator, denominator = float(mean_after.mean() - chance), float(before.mean() - chance)
    ratio = numerator / denominator if denominator else math.nan
    weight = right_or_wrong(before, after)
    pseudo = np.empty((0, 2)) if weight is None else weight * np.eye(2)
    influence = ((mean_after - chance) - ratio * (before - chance)) / denominator if denominator else np.zeros_like(before)
    extra = (
        float(np.sum(((pseudo[:, 1] - ratio * pseudo[:, 0] - chance * (1 - ratio)) / denominator / len(before)) ** 2))
        if denominator
        else 0.0
    )
    orders = tuple(float((row.mean() - chance) / denominator) if denominator else math.nan for row in after)
    estimate = Estimate(value=ratio, pools={pool: influence}, orders=orders, extra_variance=extra)

    added = np.concatenate([np.stack([before, mean_after], 1), pseudo])
    covariance = np.cov(added.T) / len(before)
    order_variance = variance_of_mean(after.mean(1))
    moments = Moments(
        numerator=numerator,
        denominator=denominator,
        var_top=covariance[1, 1] + order_variance,
        var_bottom=covariance[0, 0],
        covariance=covariance[0, 1],
    )
    above = denominator - normal_quantile() * math.sqrt(covariance[0, 0]) > 0
    return Retained(moments=moments, estimate=estimate, can_show_damage=above)


def paired_change(before_N: Array, after_KN: Array, *, pool: str) -> Estimate:
    """Return the mean of after - before of items answered before, (N,), and after the edits under each order, (K, N).

    Where every item is right or wrong, the variance has in it one more lost and one more gained item, as in `retained`.
    """
    before, after = np.asarray(before_N, float), np.asarray(after_KN, float)
    difference = after.mean(0) - before
    weight = right_or_wrong(before, after)
    return Estimate(
        value=float(difference.mean()),
        pools={pool: difference},
        orders=tuple(float((row - before).mean()) for row in after),
        extra_variance=0.0 if weight is None else 2 * (weight / len(before)) ** 2,
    )


def right_or_wrong(before_N: Array, after_KN: Array) -> float | None:
    """Return the largest weight of items that are right (their weight, 1 where all count the same) or wrong (0); None: graded."""
    pairs = np.concatenate([np.asarray(before_N, float)[None], np.asarray(after_KN, float)])
    weights = pairs.max(0)
    if bool(((pairs == 0) | (pairs == weights)).all()):
        return float(weights.max()) or 1.0
    return None


def fieller(moments: Moments, *, quantile: float) -> Interval:
    """Return x / y with Fieller's interval: the r with (x - r y)^2 <= t^2 (v_xx - 2 r v_xy + r^2 v_yy).

    Infinite on both sides where the denominator cannot be told from zero.
    """
    t2, x, y = quantile * quantile, moments.numerator, moments.denominator
    a = y**2 - t2 * moments.var_bottom
    b = x * y - t2 * moments.covariance
    c = x**2 - t2 * moments.var_top
    value = x / y if y else math.nan
    if a <= 0:
        return Interval(value=value, low=-math.inf, high=math.inf)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(value=value, low=(b - root) / a, high=(b + root) / a)


# -- along the edits -------------------------------------------------------------------------------------------------------


def last_kept(curve: Sequence[tuple[int, Interval]], share: float) -> int:
    """Return n90 (share 0.9) or n50 (0.5): the largest number of edits up to which every lower bound keeps the share; 0: none does."""
    kept = itertools.takewhile(lambda point: point[1].low >= share, sorted(curve, key=lambda point: point[0]))
    return max((rung for rung, _ in kept), default=0)


def first_lost(curve: Sequence[tuple[int, Interval]], share: float) -> int | None:
    """Return the smallest number of edits at which even the upper bound is below the share, or None."""
    return min((rung for rung, interval in curve if interval.high < share), default=None)


def area_weights(rungs: Sequence[int]) -> tuple[float, ...]:
    """Return weights of the mean height of a curve over log(1 + n), n from the first rung to the last (trapezoids).

    Raises:
        ValueError: fewer than two rungs.
    """
    if len(rungs) < 2:
        raise ValueError(f"an area needs at least 2 rungs; got {len(rungs)}")
    x = np.log1p(np.asarray(rungs, float))
    widths = np.diff(x)
    weights = np.concatenate([[0.0], widths]) / 2 + np.concatenate([widths, [0.0]]) / 2
    return tuple(float(weight) for weight in weights / (x[-1] - x[0]))


# -- pieces ----------------------------------------------------------------------------------------------------------------


def variance_of_mean(values: Array) -> float:
    """Return the variance of the mean of values; 0 of one."""
    return float(np.var(values, ddof=1) / len(values)) if len(values) > 1 else 0.0
