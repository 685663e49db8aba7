"""The findings that compare models (arXiv 2410.18785, sections 4.2 and 4.3): base against instruction-tuned, and sizes of one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from editeval.report.intervals import Interval
from editeval.report.series import Series
from editeval.report.settings import NAMED_SETTINGS, apart, beside_the_method, short
from editeval.report.statistics import Estimate, area_weights, combine
from editeval.report.statistics_across import spearman
from editeval.report.study import Run, Studies
from editeval.report.verdicts import (
    KEEPS,
    Outcome,
    Verdict,
    by_majority,
    decided,
    label_of,
    measured_ones,
    range_of,
    weighed,
)
from editeval.runner.table import Column, format_number

ADVANTAGE = 0.05  # an area that is not even so much larger is no advantage
MIN_ORDERS, MIN_SIZES = 3, 5
MIN_SCALED = 2  # methods: figure 4 of the paper has two
MAY_DIFFER = ("prompt_format", "revision")  # between a base model and the one made from it


def tuned_models(methods: Sequence[Series], known: Studies) -> Verdict:
    """F4.2: instruction-tuned models decline more slowly: area under r over log n, tuned - base, same edits and same items."""
    statement = "Instruction-tuned models lose their abilities more slowly than the base models that they were made from."
    heads = ("family", "method", "data set", "orders", "rungs", "area base", "area tuned", "tuned - base", "95% interval")
    rows, cast, counted, fewest, whole = [heads], [], [], None, []
    unknown = _without_a_sibling(methods, known)
    for family, base, tuned in _sibling_series(methods, known):
        name = f"{family} {tuned.method}"
        found = area_difference(base, tuned)
        if found is None:
            unknown.append(name)
            continue
        areas, orders, rungs = found
        if not (_edits_show(base, rungs[-1]) and _edits_show(tuned, rungs[-1])):
            continue
        interval = areas[2].interval()
        told = (format_number(areas[0].value), format_number(areas[1].value), format_number(interval.value), range_of(interval))
        rows.append((family, tuned.method, base.dataset, str(orders), f"{rungs[0]} to {rungs[-1]}", *told))
        if not any(_has_lost(one, rungs[-1]) for one in (base, tuned)):
            whole.append(name)
            continue
        fewest = min(orders, fewest or orders)
        counted.append(tuned)
        cast.append((f"{family} {base.runs[0].method}", decided(interval, above=0, below=ADVANTAGE)))
    votes = by_majority(cast)
    outcome, too_few = weighed(votes, counted)
    reason = (
        f"Of {votes.total} methods on pairs of which one model lost something: {votes}."
        if votes.total
        else "No pair of a base and a tuned model was measured with edits that are there and lost something."
    )
    reason += too_few
    if whole:
        reason += f" Not counted, because neither model surely lost anything: {', '.join(whole)}."
    if unknown:
        reason += (
            " Not compared, for want of shared settings, edits, orders, benchmarks or rungs, or broken under some orders only: "
            f"{', '.join(unknown)}."
        )
    if fewest is not None and fewest < MIN_ORDERS:
        outcome, reason = Outcome.UNDECIDED, f"{reason} Needs {MIN_ORDERS} orders of the same edits; has {fewest}."
    return Verdict(question="rq2", key="F4.2", statement=statement, outcome=outcome, reason=reason, table=tuple(rows))


def area_difference(base: Series, tuned: Series) -> tuple[tuple[Estimate, Estimate, Estimate], int, tuple[int, ...]] | None:
    """Return (area of base, of tuned, tuned - base), the number of orders, and the rungs; None where they cannot be compared.

    They can where the same facts were edited in the same orders, and measured by the same benchmarks.

    Nothing is left (r = 0) of a model that broke under every order before a rung at which the other was measured. One that broke
    under some orders only has no such number: the orders that were measured are those it survived.
    """
    seeds = sorted(set(base.seeds) & set(tuned.seeds))
    if not seeds:
        return None
    one, other = (replace(series, runs=tuple(run for seed in seeds for run in series.runs if run.seed == seed)) for series in (base, tuned))
    rungs = tuple(
        rung for rung in sorted({*one.mean, *other.mean}) if all(rung in series.mean or series.is_broken(rung) for series in (one, other))
    )
    counted = {frozenset(column.name for column in series.counted) for series in (one, other) if series.mean}
    same_edits = all(mine.edited_as(theirs) for mine, theirs in zip(one.runs, other.runs, strict=True))
    if not rungs or not same_edits or len(counted) > 1 or _broke_under_some(one, other) or _broke_under_some(other, one):
        return None
    weights = area_weights((0, *rungs))
    areas = [_area(series, rungs, weights) for series in (one, other)]
    return (areas[0], areas[1], combine([(1, areas[1]), (-1, areas[0])])), len(seeds), rungs


def _area(series: Series, rungs: Sequence[int], weights: Sequence[float]) -> Estimate:
    gone = Estimate(value=0.0, orders=(0.0,) * len(series.runs))
    area = combine([(weight, series.mean_estimate(rung) or gone) for weight, rung in zip(weights[1:], rungs, strict=True)])
    start = weights[0]  # the unedited model keeps all of its ability
    return replace(area, value=area.value + start, orders=tuple(order + start for order in area.orders))


def _broke_under_some(series: Series, other: Series) -> bool:
    """Return whether a series broke under some of its orders, not all, before a rung at which the other was measured."""
    broken = [run.broken_at for run in series.runs if run.broken_at is not None]
    return 0 < len(broken) < len(series.runs) and any(rung >= min(broken) and rung not in series.mean for rung in other.mean)


def _edits_show(series: Series, rung: int) -> bool:
    """Return whether edits did something up to a rung: all so far are there, or they broke the model."""
    return series.is_broken(rung) or bool(series.edits_are_there(rung))


def _has_lost(series: Series, last: int) -> bool:
    lost = series.first_lost(KEEPS)
    return lost is not None and lost <= last


def _sibling_series(methods: Sequence[Series], known: Studies) -> list[tuple[str, Series, Series]]:
    """Return (family, base, tuned) for each pair of series with the same method, settings and data set.

    The format of prompts may differ: a base model has no chat template, and with a tuned one it is compared under each.
    """
    return [
        (pair["family"], base, tuned)
        for pair, bases, tuned_ones in _both_of_pairs(methods, known)
        for base in bases
        for tuned in tuned_ones
        if base.runs[0].method == tuned.runs[0].method and not _apart(base, tuned)
    ]


def _without_a_sibling(methods: Sequence[Series], known: Studies) -> list[str]:
    """Return the series of a pair whose method was run on both models, but never with the same settings and data set.

    With what differs from the sibling that is nearest: its own value, and the sibling's.
    """
    found = []
    for _, bases, tuned_ones in _both_of_pairs(methods, known):
        for mine, others in ((bases, tuned_ones), (tuned_ones, bases)):
            for one in mine:
                differences = [_apart(one, other) for other in others if other.runs[0].method == one.runs[0].method]
                if differences and all(differences):
                    nearest = min(differences, key=len)
                    told = [f"{name} {_told(own)} / {_told(other)}" for name, (own, other) in list(nearest.items())[:NAMED_SETTINGS]]
                    found.append(f"{label_of(one)} ({', '.join([*told, '…'] if len(nearest) > NAMED_SETTINGS else told)})")
    return found


def _both_of_pairs(methods: Sequence[Series], known: Studies) -> list[tuple[Mapping[str, str], list[Series], list[Series]]]:
    """Return each pair of models with the series of its base model and those of its tuned one."""

    def of(model: str) -> list[Series]:
        return [one for one in measured_ones(methods) if one.model == model]

    return [(pair, of(pair["base"]), of(pair["tuned"])) for pair in known.pairs]


def _apart(one: Series, other: Series) -> dict[str, tuple[Any, Any]]:
    """Return what two series of a method differ in that siblings must share: data set, settings, facts an edit, precision.

    A revision is of its own model, and prompts may have another format.
    """
    mine, theirs = (
        {"data set": each.dataset, **each.settings, **beside_the_method(each.runs[0].config), **each.setup} for each in (one, other)
    )
    return {name: values for name, values in apart(mine, theirs).items() if name not in MAY_DIFFER}


def _told(value: Any) -> str:
    return short(str(value))


def larger_models(methods: Sequence[Series], known: Studies) -> Verdict:
    """F4.3: larger models of a family suffer less: Spearman of size and r, where something was lost.

    The mean r is over the benchmarks on which every size is above chance, or sizes would be compared on different ones. Every size has
    the same settings of the method: layers that are null are the same relative depth at every size, or its last ones, and numbers are the
    same depth in models that are equally deep alone. Precision may differ, for the largest sizes fit in half of it only.
    """
    statement = "Larger models of one family keep more of their abilities under the same edits."
    rows = [("family", "method", "data set", "edits", "benchmarks", "sizes", "Spearman", "95% interval", "p")]
    cast, counted, untested = [], [], []
    for (family, method, dataset), by_size in _ladders(methods, known).items():
        if len(by_size) < MIN_SIZES:
            untested.append(f"{family} {method} ({len(by_size)} sizes)")
            continue
        other = _settings_apart(list(by_size.values()))
        if other:
            untested.append(f"{family} {method} (other settings at some sizes: {', '.join(other)})")
            continue
        if not _same_edits(list(by_size.values())):
            untested.append(f"{family} {method} (not the same edits at every size)")
            continue
        common = _counted_by_all(list(by_size.values()))
        if not common:
            untested.append(f"{family} {method} (no benchmark on which every size is above chance)")
            continue
        tested = _first_loss({size: (one, one.mean_over(common)) for size, one in by_size.items()})
        if tested is None:
            untested.append(f"{family} {method} (nothing lost at any size)")
            continue
        rung, kept = tested
        interval, p = spearman(list(kept), list(kept.values()))
        measured = (str(rung), str(len(common)), str(len(kept)))
        rows.append((family, method, dataset, *measured, format_number(interval.value), range_of(interval), f"{p:.3g}"))
        there = all(_edits_show(one, rung) for one in by_size.values())
        first = next(iter(by_size.values()))
        counted.append(first)
        name = f"{family} {first.runs[0].method}"
        cast.append((name, decided(interval, above=0, below=0) if there else None))
    votes = by_majority(cast)
    reason = (
        f"Of {votes.total} methods on families tested at the first rung with a loss: {votes}."
        if votes.total
        else "No family was measured at enough sizes on the same benchmarks with a loss."
    )
    outcome, too_few = weighed(votes, counted, minimum=MIN_SCALED)
    reason += too_few
    if untested:
        reason += f" No test: {', '.join(untested)}; at least {MIN_SIZES} sizes are needed."
    return Verdict(question="rq3", key="F4.3", statement=statement, outcome=outcome, reason=reason, table=tuple(rows))


def _settings_apart(series: Sequence[Series]) -> tuple[str, ...]:
    """Return the names of the method's settings that are not the same at every size."""
    first, *others = [one.setup for one in series]
    return tuple(dict.fromkeys(name for other in others for name in apart(first, other)))


def _same_edits(series: Sequence[Series]) -> bool:
    """Return whether the same facts were edited in each order; orders that a size lacks say nothing."""
    first: dict[int, Run] = {}
    return all(first.setdefault(run.seed, run).edited_as(run) for one in series for run in one.runs)


def _counted_by_all(series: Sequence[Series]) -> tuple[Column, ...]:
    """Return the benchmarks that the means of all series are over; those that broke before a first rung have none."""
    first, *others = [one.counted for one in series if one.mean] or [()]
    return tuple(column for column in first if all(column in other for other in others))


def _first_loss(by_size: Mapping[float, tuple[Series, Mapping[int, Interval]]]) -> tuple[int, dict[float, float]] | None:
    """Return the first number of edits at which a size has surely lost something, and what each kept; None: there is none.

    A size that broke has kept nothing.
    """
    for rung in sorted({rung for _, means in by_size.values() for rung in means}):
        if not all(rung in means or one.is_broken(rung) for one, means in by_size.values()):
            continue
        if any(rung not in means or means[rung].high < KEEPS for _, means in by_size.values()):
            return rung, {size: means[rung].value if rung in means else 0.0 for size, (_, means) in by_size.items()}
    return None


def _ladders(methods: Sequence[Series], known: Studies) -> Mapping[tuple[str, str, str], dict[float, Series]]:
    found: dict[tuple[str, str, str], dict[float, Series]] = {}
    for family, sizes in known.families.items():
        for one in measured_ones(methods):
            if one.model in sizes:
                found.setdefault((family, one.method, one.dataset), {})[sizes[one.model]] = one
    return {name: dict(sorted(by_size.items())) for name, by_size in found.items()}
