"""The findings that compare models (arXiv 2410.18785, sections 4.2 and 4.3): base against instruction-tuned, and sizes of one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from editeval.report.series import Series
from editeval.report.statistics import Estimate, area_weights, combine, spearman
from editeval.report.study import Studies
from editeval.report.verdicts import KEEPS, Outcome, Verdict, Votes, measured_ones, range_of
from editeval.runner.table import format_number

ADVANTAGE = 0.05  # an area that is not even so much larger is no advantage
MIN_ORDERS, MIN_SIZES = 3, 5


def tuned_models(methods: Sequence[Series], known: Studies) -> Verdict:
    """F4.2: instruction-tuned models decline more slowly: area under r over log n, tuned - base, same edits and same items."""
    statement = "Instruction-tuned models lose their abilities more slowly than the base models that they were made from."
    heads = ("family", "method", "data set", "orders", "rungs", "area base", "area tuned", "tuned - base", "95% interval")
    votes, rows, fewest = Votes(), [heads], None
    for family, base, tuned in _sibling_series(methods, known):
        found = area_difference(base, tuned)
        if found is None or not (base.edits_were_there and tuned.edits_were_there):
            continue
        areas, orders, rungs = found
        interval = areas[2].interval()
        fewest = min(orders, fewest or orders)
        told = (format_number(areas[0].value), format_number(areas[1].value), format_number(interval.value), range_of(interval))
        rows.append((family, base.method, base.dataset, str(orders), f"{rungs[0]} to {rungs[-1]}", *told))
        bucket = votes.yes if interval.low > 0 else votes.no if interval.high < ADVANTAGE else votes.open
        bucket.append(f"{family} {base.method}")
    outcome = votes.outcome(1)
    reason = (
        f"Of {votes.total} pairs: {votes}."
        if votes.total
        else "No pair of a base and a tuned model was measured with edits that are there."
    )
    if fewest is not None and fewest < MIN_ORDERS:
        outcome, reason = Outcome.UNDECIDED, f"{reason} Needs {MIN_ORDERS} orders of the same edits; has {fewest}."
    return Verdict(question="rq2", key="F4.2", statement=statement, outcome=outcome, reason=reason, table=tuple(rows))


def area_difference(base: Series, tuned: Series) -> tuple[tuple[Estimate, Estimate, Estimate], int, tuple[int, ...]] | None:
    """Return (area of base, of tuned, tuned - base), the number of orders, and the rungs; None where they share too little."""
    seeds = sorted(set(base.seeds) & set(tuned.seeds))
    if not seeds:
        return None
    one, other = (replace(series, runs=tuple(run for seed in seeds for run in series.runs if run.seed == seed)) for series in (base, tuned))
    rungs = tuple(sorted(set(one.mean) & set(other.mean)))
    if not rungs or {column.name for column in one.counted} != {column.name for column in other.counted}:
        return None
    weights = area_weights((0, *rungs))
    areas = [_area(series, rungs, weights) for series in (one, other)]
    return (areas[0], areas[1], combine([(1, areas[1]), (-1, areas[0])])), len(seeds), rungs


def _area(series: Series, rungs: Sequence[int], weights: Sequence[float]) -> Estimate:
    terms = [
        (weight, estimate) for weight, rung in zip(weights[1:], rungs, strict=True) if (estimate := series.mean_estimate(rung)) is not None
    ]
    area = combine(terms)
    start = weights[0]  # the unedited model keeps all of its ability
    return replace(area, value=area.value + start, orders=tuple(order + start for order in area.orders))


def _sibling_series(methods: Sequence[Series], known: Studies) -> list[tuple[str, Series, Series]]:
    by_name = {(one.model, one.method, one.dataset): one for one in methods}
    return [
        (pair["family"], one, by_name[pair["tuned"], one.method, one.dataset])
        for pair in known.pairs
        for one in methods
        if one.model == pair["base"] and (pair["tuned"], one.method, one.dataset) in by_name and one.rungs
    ]


def larger_models(methods: Sequence[Series], known: Studies) -> Verdict:
    """F4.3: larger models of a family suffer less: Spearman of size and r, where something was lost."""
    statement = "Larger models of one family keep more of their abilities under the same edits."
    rows = [("family", "method", "data set", "edits", "sizes", "Spearman", "95% interval", "p")]
    votes, untested = Votes(), []
    for (family, method, dataset), by_size in _ladders(methods, known).items():
        rungs = sorted(set.intersection(*(set(one.mean) for one in by_size.values())))
        lost = [rung for rung in rungs if any(one.mean[rung].high < KEEPS for one in by_size.values())]
        if len(by_size) < MIN_SIZES or not lost:
            why = f"{len(by_size)} sizes" if len(by_size) < MIN_SIZES else "nothing lost at any size"
            untested.append(f"{family} {method} ({why})")
            continue
        rung = lost[0]
        interval, p = spearman(list(by_size), [one.mean[rung].value for one in by_size.values()])
        rows.append((family, method, dataset, str(rung), str(len(by_size)), format_number(interval.value), range_of(interval), f"{p:.3g}"))
        there = all(one.edits_were_there for one in by_size.values())
        bucket = votes.open if not there else votes.yes if interval.low > 0 else votes.no if interval.high < 0 else votes.open
        bucket.append(f"{family} {method}")
    reason = (
        f"Of {votes.total} methods tested at the first rung with a loss: {votes}."
        if votes.total
        else "No family was measured at enough sizes with a loss."
    )
    if untested:
        reason += f" No test: {', '.join(untested)}; at least {MIN_SIZES} sizes are needed."
    return Verdict(question="rq3", key="F4.3", statement=statement, outcome=votes.outcome(1), reason=reason, table=tuple(rows))


def _ladders(methods: Sequence[Series], known: Studies) -> Mapping[tuple[str, str, str], dict[float, Series]]:
    found: dict[tuple[str, str, str], dict[float, Series]] = {}
    for family, sizes in known.families.items():
        for one in measured_ones(methods):
            if one.model in sizes:
                found.setdefault((family, one.method, one.dataset), {})[sizes[one.model]] = one
    return {name: dict(sorted(by_size.items())) for name, by_size in found.items()}
