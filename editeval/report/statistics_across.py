"""Statistics over models and over benchmarks: a rank correlation with size, and how far true values are apart.

Shapes: M estimates, K orders of edits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from editeval.report.intervals import CONFIDENCE, Interval, normal_quantile
from editeval.report.statistics import Array, Estimate, variance_of_mean

EXACT_SPEARMAN = 7  # at most so many points are permuted in every way (5,040)


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[Interval, float]:
    """Return Spearman's rank correlation with Bonett and Wright's interval, and its two-sided p-value.

    Interval: Fisher's z with standard error sqrt((1 + rho^2 / 2) / (N - 3)) (https://doi.org/10.1007/BF02294183); at rho = 1, of
    which z is infinite, that of the middle between 1 and the next rho that N ranks can have (1 - 12 / (N^3 - N)). p: over all
    permutations up to 7 points, by t beyond. A constant series has no rank: rho NaN, p 1.

    Raises:
        ValueError: fewer than 4 points, which bound nothing.
    """
    if len(x) < 4 or len(x) != len(y):
        raise ValueError(f"a rank correlation needs at least 4 pairs; got {len(x)} and {len(y)}")
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    if np.ptp(ranks_x) == 0 or np.ptp(ranks_y) == 0:
        return Interval(value=math.nan, low=-1.0, high=1.0), 1.0
    rho = _correlation(ranks_x, ranks_y)
    if len(x) <= EXACT_SPEARMAN:
        permuted = np.array(list(itertools.permutations(ranks_y)))
        centred = ranks_x - ranks_x.mean()
        every = permuted @ centred / (len(x) * ranks_x.std() * ranks_y.std())
        p_value = float(np.mean(np.abs(every) >= abs(rho) - 1e-9))
    else:
        p_value = float(stats.spearmanr(x, y).pvalue)
    half = normal_quantile() * math.sqrt((1 + rho * rho / 2) / (len(x) - 3))
    largest = 1 - 6 / (len(x) ** 3 - len(x))
    z = math.atanh(min(max(rho, -largest), largest))
    return Interval(value=rho, low=min(rho, math.tanh(z - half)), high=max(rho, math.tanh(z + half))), p_value


def between_sd(values: Sequence[float], variances: Sequence[float]) -> Interval:
    """Return the standard deviation between true values of which each was measured with a known variance.

    The estimate is Paule and Mandel's, the interval the Q profile (Viechtbauer 2007, https://doi.org/10.1002/sim.2514): the sd
    at which sum (y - mean)^2 / (v + sd^2) equals its expectation, and the two quantiles of chi squared.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a spread needs at least 2 values; got {len(values)}")
    y, v = np.asarray(values, float), np.maximum(np.asarray(variances, float), 1e-12)

    def statistic(sd: float) -> float:
        weights = 1 / (v + sd * sd)
        return float(np.sum(weights * (y - np.sum(weights * y) / weights.sum()) ** 2))

    def sd_where(level: float) -> float:
        if statistic(0.0) <= level:
            return 0.0
        upper = 1.0
        while statistic(upper) > level:
            upper *= 2
        return float(brentq(lambda sd: statistic(sd) - level, 0.0, upper))

    degrees = len(y) - 1
    low, high = (sd_where(float(stats.chi2.ppf(quantile, degrees))) for quantile in ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2))
    return Interval(value=sd_where(degrees), low=low, high=high)


def variances_apart(estimates: Sequence[Estimate]) -> list[float]:
    """Return each estimate's variance without what the orders move in all of them alike, which sets none apart from another.

    Of each order the mean over the M estimates is taken away; M / (M - 1) makes up for what it took of the estimate's own.
    """
    orders_MK = np.array([estimate.orders for estimate in estimates], float)
    own = (orders_MK - orders_MK.mean(0)) * math.sqrt(len(estimates) / (len(estimates) - 1))
    return [estimate.item_variance + variance_of_mean(row) for estimate, row in zip(estimates, own, strict=True)]


def _correlation(x: Array, y: Array) -> float:
    return float(np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std()))
