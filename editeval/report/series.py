"""Runs that differ in the seed alone are one series: its curves with intervals over items and over orders of edits.

A *series* is a model, a method with one setting, and a data set. Its retained ability is estimated for each benchmark at each
rung; the mean over benchmarks counts those on which the unedited model is above chance, and never mixes protocols.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from editeval.report.intervals import CONFIDENCE, Interval
from editeval.report.settings import across_models, differing, labelled
from editeval.report.statistics import (
    Estimate,
    Moments,
    Retained,
    combine,
    first_lost,
    holm,
    last_kept,
    mcnemar,
    paired_bootstrap,
    paired_change,
    retained,
    right_or_wrong,
    share_over_orders,
)
from editeval.report.study import Run, Studies, about_edits, monitored
from editeval.runner.table import NORMAL_95, PROTOCOLS_FIRST, Column

RESAMPLES = 2000
THERE = 0.1  # edits are there if the lower bound of efficacy is this much above the unedited model's


@dataclass(frozen=True, kw_only=True)
class Change:
    """A paired test of one benchmark at one rung of one run against the unedited model."""

    run: Run
    column: Column
    rung: int
    difference: float
    p_value: float
    adjusted: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Runs of one model, method setting and data set, one a seed. `twins` would be a second run of a seed and count nowhere."""

    model: str
    method: str  # with what tells it from other settings of the same method
    dataset: str
    runs: tuple[Run, ...]
    is_control: bool
    known: Studies
    settings: Mapping[str, str] = field(default_factory=dict)  # of the method, in which runs of it differ
    twins: tuple[Run, ...] = ()

    @property
    def reproduces_a_fault(self) -> bool:
        """Whether the method is set to do what a published code did wrong."""
        return self.runs[0].reproduces_a_fault

    @property
    def is_the_papers(self) -> bool:
        """Whether the paper has the method, with this setting."""
        return self.runs[0].is_the_papers

    @property
    def is_flat_in_paper(self) -> bool:
        """Whether the paper's figure shows the method flat to thousands of edits."""
        return self.runs[0].method in self.known.flat_in_paper

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, which are orders of edits."""
        return tuple(run.seed for run in self.runs)

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """Numbers of edits that every run has, without 0."""
        return tuple(sorted(set.intersection(*(set(run.rungs) for run in self.runs)) - {0}))

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Ability and safety columns that every run has at rung 0 and at some rung, measured with the same settings."""
        first, *others = (set(run.ability_columns) for run in self.runs)
        common = first.intersection(*others) - set(self.mixed)
        return tuple(column for column in self.runs[0].ability_columns if column in common and (0, column) in self.runs[0].table.cells)

    @cached_property
    def mixed(self) -> tuple[Column, ...]:
        """Columns that were measured with other settings (a limit, shots) in one run than in another: no mean is over them."""
        found = []
        first = self.runs[0]
        for column in (*first.ability_columns, *monitored(first)):
            keys = {score.benchmark_key for run in self.runs if (score := run.table.cells.get((0, column))) is not None}
            if len(keys) > 1 and column.benchmark not in about_edits(self.runs[0].table.columns):
                found.append(column)
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out of the series, and why."""
        whose = f"{self.model}, {self.method}, {self.dataset}"
        benchmarks = dict.fromkeys(column.benchmark_label for column in self.mixed)
        kept = {run.seed: run.folder.as_posix() for run in self.runs}
        broken = [f"{run.broken_at} (order {run.seed})" for run in self.runs if run.broken_at is not None]
        return (
            *(
                f"{whose}: no curve joins its orders, for the model broke under some of them before any rung, at edit {', '.join(broken)}."
                for _ in broken[:1]
                if self.broke_before_a_rung
            ),
            *(f"{whose}: {name} is left out: it was not measured with the same settings for every seed." for name in benchmarks),
            *(f"{whose}: {run.folder.as_posix()} is left out: {kept[run.seed]} has the same seed and is counted." for run in self.twins),
        )

    @cached_property
    def ability(self) -> tuple[Column, ...]:
        """Columns of general ability."""
        return tuple(column for column in self.columns if not self.known.is_safety(column))

    @cached_property
    def safety(self) -> tuple[Column, ...]:
        """Columns of safety."""
        return tuple(column for column in self.columns if self.known.is_safety(column))

    @cached_property
    def setup(self) -> Mapping[str, Any]:
        """What the method was set to, as far as it must be the same on another model before the two are compared."""
        return across_models(self.runs[0].config.get("method", {}))

    # -- edit quality ----------------------------------------------------------------------------------------------

    def quality(self, metric: str) -> dict[int, Interval]:
        """Return a measure of edit quality at each rung over all facts edited so far: Wilson's interval, over facts and orders.

        The facts are pooled over runs.
        """
        found: dict[int, Interval] = {}
        for rung in (0, *self.rungs):
            scores = [
                run.table.cells[(rung, column)]
                for run in self.runs
                if (column := run.edit_column(metric)) is not None and (rung, column) in run.table.cells
            ]
            n = sum(score.n for score in scores)
            if n and all(math.isfinite(score.value) for score in scores):
                share = sum(score.value * score.n for score in scores) / n
                found[rung] = share_over_orders(share, [score.value for score in scores], n)
        return found

    @cached_property
    def efficacy(self) -> dict[int, Interval]:
        """Efficacy at each rung."""
        return self.quality("efficacy")

    def edits_are_there(self, rung: int) -> bool | None:
        """Return whether the edits show at a rung: efficacy's lower bound well above the unedited model's; None: not measured."""
        if rung not in self.efficacy:
            return None
        before = self.efficacy[0].value if 0 in self.efficacy else 0.0
        return self.efficacy[rung].low - before > THERE

    # -- retained ability ------------------------------------------------------------------------------------------

    @cached_property
    def _retained(self) -> dict[tuple[int, Column], Retained]:
        return {
            (rung, column): found
            for column in self.columns
            for rung in self.rungs
            if (found := _retained_of(self.runs, rung, column, balanced=self.known.is_balanced(column))) is not None
        }

    def retained(self, rung: int, column: Column) -> Retained | None:
        """Return r of a benchmark at a rung, or None where it was not measured."""
        return self._retained.get((rung, column))

    def can_show_damage(self, column: Column) -> bool:
        """Return whether the unedited model is above chance on a benchmark."""
        return any(found.can_show_damage for (_, other), found in self._retained.items() if other == column)

    @cached_property
    def protocol(self) -> str | None:
        """The protocol of most ability benchmarks that can show damage; means are over these."""
        names = [column.protocol for column in self.ability if self.can_show_damage(column)]
        order = [*PROTOCOLS_FIRST, *names]
        return max(dict.fromkeys(names), key=lambda name: (names.count(name), -order.index(name)), default=None)

    @cached_property
    def counted(self) -> tuple[Column, ...]:
        """Ability benchmarks that the mean is over."""
        return tuple(column for column in self.ability if column.protocol == self.protocol and self.can_show_damage(column))

    def mean_estimate(self, rung: int, columns: Sequence[Column] | None = None) -> Estimate | None:
        """Return the mean r over the counted (or these) benchmarks as an estimate that can be compared with others'."""
        found = [self.retained(rung, column) for column in (self.counted if columns is None else columns)]
        kept = [one.estimate for one in found if one is not None]
        return combine([(1 / len(kept), estimate) for estimate in kept]) if kept and len(kept) == len(found) else None

    @cached_property
    def mean(self) -> dict[int, Interval]:
        """Mean r at each rung, where all counted benchmarks were measured."""
        return self.mean_over(self.counted)

    def mean_over(self, columns: Sequence[Column], confidence: float = CONFIDENCE) -> dict[int, Interval]:
        """Return the mean r over some benchmarks at each rung, where all of them were measured."""
        if len(columns) == 1:
            return {rung: found.at(confidence) for rung in self.rungs if (found := self.retained(rung, columns[0])) is not None}
        estimates = {rung: self.mean_estimate(rung, columns) for rung in self.rungs}
        return {rung: estimate.interval(confidence) for rung, estimate in estimates.items() if estimate is not None}

    def last_kept(self, share: float, confidence: float = CONFIDENCE) -> int:
        """Return n90 or n50 of the mean, by intervals of a confidence; 0 where no rung keeps it."""
        mean = self.mean if confidence == CONFIDENCE else self.mean_over(self.counted, confidence)
        return last_kept(list(mean.items()), share)

    def first_lost(self, share: float) -> int | None:
        """Return the first number of edits at which the mean has certainly lost the share, or every run broke; None: never seen."""
        found = [first_lost(list(self.mean.items()), share), self.broken_at]
        return min((rung for rung in found if rung is not None), default=None)

    @property
    def broken_at(self) -> int | None:
        """The number of edits by which the model broke under every order, so that nothing is left; None: under some it did not."""
        broken = [run.broken_at for run in self.runs]
        return max((step for step in broken if step is not None), default=None) if all(broken) else None

    @property
    def broke_before_a_rung(self) -> bool:
        """Whether the model broke under some orders so early that no rung was measured under all of them."""
        return not self.rungs and self.broken_at is None and any(run.broken_at is not None for run in self.runs)

    def is_broken(self, rung: int) -> bool:
        """Return whether nothing is left at a rung because the model broke before it could be measured there."""
        return rung not in self.mean and self.broken_at is not None and self.broken_at <= rung


def _retained_of(runs: Sequence[Run], rung: int, column: Column, *, balanced: bool) -> Retained | None:
    scores = [(run.table.cells.get((0, column)), run.table.cells.get((rung, column))) for run in runs]
    pairs = [(before, after) for before, after in scores if before is not None and after is not None]
    if len(pairs) < len(runs) or not all(math.isfinite(score.value) for pair in pairs for score in pair):
        return None
    base = runs[0].outcomes.get((0, column))
    chance = pairs[0][0].chance or 0.0
    if base is not None:
        rows = [None if (found := run.outcomes.get((rung, column))) is None else found.aligned(base.names) for run in runs]
        if all(row is not None for row in rows):
            even = 0.5 if balanced and not pairs[0][0].chance else chance
            return retained(base.values, np.array(rows, float), chance=even, pool=f"{column.name} {hash(base.names)}")
    return _retained_of_means(pairs, chance)


def _retained_of_means(pairs: Sequence[tuple[Any, Any]], chance: float) -> Retained:
    """Return r from means and standard errors alone: taken as independent, which is wider than the truth."""
    before, after = pairs[0][0], [score for _, score in pairs]
    top, bottom = float(np.mean([score.value for score in after])) - chance, before.value - chance
    var_top, var_bottom = float(np.mean([(score.stderr or 0.0) ** 2 for score in after])), (before.stderr or 0.0) ** 2
    ratio = top / bottom if bottom else math.nan
    estimate = Estimate(
        value=ratio,
        orders=tuple((score.value - chance) / bottom if bottom else math.nan for score in after),
        extra_variance=(var_top + ratio**2 * var_bottom) / bottom**2 if bottom else 0.0,
    )
    moments = Moments(
        numerator=top,
        denominator=bottom,
        var_top=var_top + estimate.order_variance * bottom**2,
        var_bottom=var_bottom,
        covariance=0.0,
    )
    return Retained(moments=moments, estimate=estimate, can_show_damage=bottom - NORMAL_95 * math.sqrt(var_bottom) > 0)


# -- grouping --------------------------------------------------------------------------------------------------------------


def series_of(runs: Sequence[Run], known: Studies) -> tuple[Series, ...]:
    """Group runs into series; where a method was run with several settings, its label says what differs.

    A setting that differs on one model is told on every model, so that a method is called the same on all of them.
    """
    settings = differing(runs, "method", lambda run: (run.method, run.model))
    of_data = differing(runs, "dataset", lambda run: (run.dataset, ""))
    grouped: dict[tuple[str, str, str], dict[int, Run]] = {}
    twins: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        name = (run.model, labelled(run.method, settings[run.folder]), labelled(run.dataset, of_data[run.folder]))
        if grouped.setdefault(name, {}).setdefault(run.seed, run) is not run:
            twins.setdefault(name, []).append(run)
    return tuple(
        Series(
            model=model,
            method=method,
            dataset=dataset,
            runs=tuple(found.values()),
            is_control=next(iter(found.values())).method in known.controls,
            known=known,
            settings=settings[next(iter(found.values())).folder],
            twins=tuple(twins.get((model, method, dataset), ())),
        )
        for (model, method, dataset), found in grouped.items()
    )


# -- tests -----------------------------------------------------------------------------------------------------------------


def changes(series: Sequence[Series]) -> tuple[Change, ...]:
    """Test every benchmark of every run at every rung against the unedited model on the same items; Holm over all of them."""
    found = [
        Change(run=run, column=column, rung=rung, difference=float(np.mean(after - before)), p_value=p_value(before, after))
        for one in series
        for run in one.runs
        for column in one.columns
        if (base := run.outcomes.get((0, column))) is not None
        for rung in run.rungs
        if rung and (now := run.outcomes.get((rung, column))) is not None
        for before, after in [(base.values, now.aligned(base.names))]
        if after is not None
    ]
    adjusted = holm([change.p_value for change in found])
    return tuple(
        Change(run=change.run, column=change.column, rung=change.rung, difference=change.difference, p_value=change.p_value, adjusted=value)
        for change, value in zip(found, adjusted, strict=True)
    )


def p_value(before: Any, after: Any) -> float:
    """Return the p-value of a paired change: McNemar's test for right and wrong, whatever items weigh; else the bootstrap.

    Where no resampled mean is on the other side of zero the bootstrap only says how often it was drawn, which no adjustment for
    many tests survives: there it is the t test's.
    """
    if right_or_wrong(before, np.array([after])) is not None:
        return mcnemar((before > 0).astype(float), (after > 0).astype(float))
    found = paired_bootstrap(before, after, seed=0, resamples=RESAMPLES)[1]
    return found if found > 2 / (RESAMPLES + 1) else min(found, paired_change(before, np.array([after]), pool="items").p_value())
