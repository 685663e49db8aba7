"""Curves of a series of runs: means over orders of edits with their intervals, the scores of one order, what is published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from editeval.report.charts import Curve, Point, finite
from editeval.report.intervals import Interval, score_interval, share_interval, share_variance
from editeval.report.published import PublishedRow
from editeval.report.series import Series
from editeval.report.statistics import Estimate
from editeval.report.study import Run
from editeval.runner.table import Column
from editeval.types import Score

MOST_LOG = 700.0  # of a number that a float can hold


def curve_of(one: Series, values: Mapping[int, Interval], label: str, colour: int, *, dashed: bool = False) -> Curve:
    """Return a curve with intervals."""
    points = finite([Point(rung, value.value, value.low, value.high) for rung, value in sorted(values.items())])
    return Curve(label=label, model=one.model, method=one.method, dataset=one.dataset, points=points, colour=colour, dashed=dashed)


def monitor_curve(one: Series, values: Mapping[int, Sequence[float]], colour: int, *, log: bool = False) -> Curve:
    """Return the mean over runs at each rung, with its interval over orders; no `log`: of a share."""
    found = {rung: interval for rung, mine in values.items() if (interval := _interval(mine, error=0.0, log=log)) is not None}
    if not log:
        found = {rung: replace(share, low=max(0.0, share.low), high=min(1.0, share.high)) for rung, share in found.items()}
    return curve_of(one, found, one.method, colour)


def score_curve(one: Series, column: Column, colour: int, *, log: bool) -> Curve:
    """Return a score that is no share, such as perplexity: its mean over runs, with its interval over orders and tokens."""
    found = {}
    for rung in (0, *one.rungs) if column not in one.mixed else ():
        scores = [score for run in one.runs if (score := run.table.cells.get((rung, column))) is not None]
        values, error = [score.value for score in scores], fmean([score.stderr or 0.0 for score in scores] or [0.0])
        interval = _interval(values, error=error, log=log) if len(scores) == len(one.runs) else None
        if interval is not None:
            found[rung] = interval
    return curve_of(one, found, one.method, colour)


def _interval(orders: Sequence[float], *, error: float, log: bool) -> Interval | None:
    """Return the mean over orders with its interval; None where one of them is no number, or has no logarithm.

    `error` is that of a number over what was asked, the same under every order.
    """
    if not all(math.isfinite(value) and (value > 0 or not log) for value in orders):
        return None
    turned = tuple(math.log(value) for value in orders) if log else tuple(orders)
    of_items = error / fmean(orders) if log else error
    found = Estimate(value=fmean(turned), orders=turned, extra_variance=of_items**2).interval()
    if not log:
        return found
    value, low, high = (math.exp(min(end, MOST_LOG)) for end in (found.value, found.low, found.high))
    return Interval(value=value, low=low, high=high)


def published_points(one: Series, rows: Sequence[PublishedRow], colour: int, *, dashed: bool = False) -> Curve:
    """Return printed numbers of a series: a curve without intervals."""
    points = tuple(Point(row.num_edits, row.value, row.value, row.value) for row in rows)
    who, whose = one.method, one.model
    return Curve(label=who, model=whose, method=who, dataset=one.dataset, points=points, colour=colour, dashed=dashed, published=True)


def doubts_of(rows: Iterable[PublishedRow]) -> tuple[str, ...]:
    """Return what is doubtful about published numbers, a sentence for each method and doubt."""
    return tuple(dict.fromkeys(f"Published numbers of {row.method}: {row.doubt}." for row in rows if row.doubt))


def seed_curve(one: Series, run: Run, column: Column, colours: Mapping[str, int], dashed: Iterable[str]) -> Curve:
    """Return the scores of one run, with their own intervals."""
    scores = [score for rung in run.rungs if (score := run.table.cells.get((rung, column))) is not None]
    points = finite([_point(score) for score in scores])
    is_dashed = one.model in set(dashed)
    name = one.method
    return Curve(
        label=name,
        model=one.model,
        method=name,
        dataset=one.dataset,
        points=points,
        seed=run.seed,
        colour=colours[name],
        dashed=is_dashed,
    )


def scores_of(one: Series, column: Column) -> dict[int, Interval]:
    """Return the plain score by rung, a mean over orders of edits: Wilson's interval over items and, of several orders, over them.

    A score that is no number under some order has no interval.
    """
    found: dict[int, Interval] = {}
    for rung in (0, *one.rungs):
        scores = [score for run in one.runs if (score := run.table.cells.get((rung, column))) is not None]
        if scores:
            value = fmean(score.value for score in scores)
            if not math.isfinite(value):
                found[rung] = Interval(value=value, low=value, high=value)
                continue
            over_items = fmean(math.sqrt(share_variance(score)) for score in scores) ** 2
            estimate = Estimate(value=value, orders=tuple(score.value for score in scores), extra_variance=over_items)
            n = fmean(score.n for score in scores)  # the same items under every order
            found[rung] = share_interval(value, variance=estimate.variance, n=n, quantile=estimate.quantile())
    return found


def _point(score: Score) -> Point:
    interval = score_interval(score, is_share=True)
    return Point(score.num_edits, score.value, interval.low, interval.high)


def drawn(curves: Iterable[Curve]) -> tuple[Curve, ...]:
    """Return the curves that have points."""
    return tuple(curve for curve in curves if curve.points)


def whole() -> Interval:
    """Return what the unedited model keeps: all."""
    return Interval(value=1.0, low=1.0, high=1.0)
