"""The paper's findings (arXiv 2410.18785, section 4) as statements that runs confirm, refute or leave open.

A statement is never confirmed by edits that are not there: a series whose efficacy is near the unedited model's keeps its
ability because nothing was written. Controls, and settings that reproduce a fault of published code (`studies.yaml`), carry no vote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from editeval.report.findings_models import larger_models, tuned_models
from editeval.report.findings_safety import safety
from editeval.report.intervals import CONFIDENCE, Interval
from editeval.report.items import Degenerate
from editeval.report.series import Series
from editeval.report.statistics import share_over_orders
from editeval.report.statistics_across import between_sd, variances_apart
from editeval.report.study import Studies
from editeval.report.verdicts import (
    DOZENS,
    KEEPS,
    MIN_METHODS,
    THOUSANDS,
    Outcome,
    Verdict,
    by_majority,
    decided,
    efficacy_at,
    label_of,
    measured_ones,
    methods_in,
    names_of,
    or_dash,
    range_of,
    voter_of,
    weighed,
    yes_no,
)
from editeval.runner.table import format_number

HALF = 0.5
LEVEL = 0.05  # of the claim that any of the series scales
SPREAD = 0.1  # benchmarks degrade "about equally" if their retained ability differs by less (standard deviation)
MUTED = 0.5  # share of degenerate output of a model that is muted
MIN_BENCHMARKS = 3


def findings(series: Sequence[Series], known: Studies) -> tuple[Verdict, ...]:
    """Return the verdict on every statement, question by question."""
    methods = [one for one in series if not one.is_control and not one.reproduces_a_fault]
    return (
        dozens(methods),
        thousands(methods),
        tuned_models(methods, known),
        larger_models(methods, known),
        equal_decline(methods),
        safety(methods, known),
        muting(methods),
    )


# -- RQ1: number of edits --------------------------------------------------------------------------------------------------


def dozens(methods: Sequence[Series]) -> Verdict:
    """F4.1, first half: most methods keep 90% of ability for fewer than 100 edits only."""
    cast, counted, rows = [], [], [("model", "method", "data set", "n90", "n50", "surely below 90% at", "efficacy there", "edits there")]
    not_there = []
    for one in measured_ones(methods):
        kept, lost = one.last_kept(KEEPS), one.first_lost(KEEPS)
        read_at = _where_efficacy_is_read(one, kept, lost)
        there = None if read_at is None else one.edits_are_there(read_at)
        told = ("–", "–") if one.broke_before_a_rung else (str(kept), str(one.last_kept(HALF)))
        rows.append((*names_of(one), *told, or_dash(lost), efficacy_at(one, read_at), yes_no(there)))
        survives_dozens_only = lost is not None and lost <= DOZENS  # then the largest number that keeps 90% is smaller
        if kept >= DOZENS and not there and not survives_dozens_only:
            not_there.append(label_of(one))
            continue
        counted.append(one)
        cast.append((voter_of(one), True if survives_dozens_only else False if kept >= DOZENS else None))
    votes = by_majority(cast)
    outcome, too_few = weighed(votes, counted)
    values = [one.last_kept(KEEPS) for one in counted if not one.broke_before_a_rung]
    middle = f"; median n90 of counted series {median(values):g}" if values else ""
    reason = f"Of {votes.total} methods on models: {votes}{middle}.{too_few}" if len(rows) > 1 else "No series was measured."
    if not_there:
        reason += f" Not counted, because the edits are not there: {', '.join(not_there)}."
    statement = f"Most methods keep 90% of general ability for fewer than {DOZENS} edits only."
    return Verdict(question="rq1", key="F4.1a", statement=statement, outcome=outcome, reason=reason, table=tuple(rows))


def _where_efficacy_is_read(one: Series, kept: int, lost: int | None) -> int | None:
    """Return the last rung that keeps ability or, where none does, the first that has surely lost it, else the first of all."""
    rungs = [rung for rung in one.rungs if kept or lost is None or rung >= lost]
    return kept or next(iter(rungs or one.rungs), None)


def thousands(methods: Sequence[Series]) -> Verdict:
    """F4.1, second half: a few methods scale to thousands of edits.

    It is confirmed by one of the paper's methods that does, and refuted

    - where at least three of the paper's methods were measured, and every series of theirs has surely lost by then, or is idle;
    - where a later method does, and none of the paper's, of which one at least was measured at as many edits or fell before.

    One of many series may hold by chance: the lower bound of ability is one-sided at `LEVEL` over the number of series that were measured
    at so many edits (Bonferroni), and never less strict than that of n90. Two things are told and change no outcome: a later method that
    holds beside the paper's, and a fall of a method that the paper shows flat.
    """
    statement = (
        f"A few methods keep 90% of general ability, with their edits there, for {THOUSANDS} edits, and some of the paper's are among them."
    )
    measured = measured_ones(methods)
    far = [one for one in measured if any(rung >= THOUSANDS for rung in one.mean)]
    confidence = max(CONFIDENCE, 1 - 2 * LEVEL / max(1, len(far)))
    flat = [one for one in far if one.last_kept(KEEPS) >= THOUSANDS]
    idle = [one for one in flat if not one.edits_are_there(one.last_kept(KEEPS))]
    holders = [one for one in flat if (kept := one.last_kept(KEEPS, confidence)) >= THOUSANDS and one.edits_are_there(kept)]
    lost = [one for one in measured if (first := one.first_lost(KEEPS)) is not None and first <= THOUSANDS]
    later = [one for one in holders if not one.is_the_papers]
    asked, fallen, holding = ([one for one in found if one.is_the_papers] for found in (measured, lost, holders))
    if holding:
        outcome, reason = Outcome.CONFIRMED, f"{_listed(holding)}: n90 of at least {THOUSANDS}, edits there."
    elif methods_in(asked) >= MIN_METHODS and fallen and all(one in fallen or one in idle for one in asked):
        outcome = Outcome.REFUTED
        reason = f"All {len(fallen)} series of the paper's methods with edits are surely below 90% by {THOUSANDS} edits."
    elif later and any(one in far or one in fallen for one in asked):
        outcome = Outcome.REFUTED
        reason = f"None of {len(asked)} series of the paper's methods keeps it to {THOUSANDS}, and a later method does."
    else:
        outcome = Outcome.UNDECIDED
        largest = max((one.rungs[-1] for one in measured if one.rungs), default=0)
        reason = (
            f"The largest rung is {largest}; {len(fallen)} of {len(asked)} series of the paper's methods are surely below 90%, "
            f"none keeps it to {THOUSANDS}."
        )
    told = {
        "Flat, but without the edits": _listed(idle),
        f"n90 of at least {THOUSANDS}, but not beyond chance among {len(far)} series": _listed(
            [one for one in flat if one not in (*holders, *idle)]
        ),
        "Later methods hold": _listed(later),
        "In the paper's figure these are flat": "; ".join(
            f"{label_of(one)}, surely below 90% at {one.first_lost(KEEPS)}" for one in lost if one.is_flat_in_paper
        ),
    }
    reason += "".join(f" {what}: {which}." for what, which in told.items() if which)
    return Verdict(question="rq1", key="F4.1b", statement=statement, outcome=outcome, reason=reason)


def _listed(series: Sequence[Series]) -> str:
    return ", ".join(label_of(one) for one in series)


# -- RQ4: aspects of ability -----------------------------------------------------------------------------------------------


def equal_decline(methods: Sequence[Series]) -> Verdict:
    """F4.4: different abilities decline about equally: the spread of r between benchmarks where the mean has fallen but not to zero.

    Each series is read at its own first rung where it has surely fallen and not vanished: methods fall at different numbers of edits, and
    the spread is one within a series. That the interval of the spread must be below the limit, not the estimate alone, is stricter than
    the paper asks, on purpose: an estimate below it is what few items give.
    """
    statement = f"Different abilities are lost about equally (standard deviation of retained ability between benchmarks below {SPREAD:g})."
    cast, counted, rows = [], [], [("model", "method", "data set", "edits", "benchmarks", "mean r", "sd between", "95% interval")]
    for one in measured_ones(methods):
        falling = [rung for rung, interval in one.mean.items() if interval.high < KEEPS and interval.low > 1 - KEEPS]
        if not falling or len(one.counted) < MIN_BENCHMARKS:
            continue
        rung = falling[0]
        estimates = [found.estimate for column in one.counted if (found := one.retained(rung, column)) is not None]
        spread = between_sd([estimate.value for estimate in estimates], variances_apart(estimates))
        rows.append(
            (
                *names_of(one),
                str(rung),
                str(len(estimates)),
                format_number(one.mean[rung].value),
                format_number(spread.value),
                range_of(spread),
            )
        )
        unequal = decided(spread, above=SPREAD, below=SPREAD)
        counted.append(one)
        cast.append((voter_of(one), None if unequal is None else not unequal))
    votes = by_majority(cast)
    reason = (
        f"Of {votes.total} methods on models in which ability has fallen but not vanished: {votes}."
        if votes.total
        else f"No series has {MIN_BENCHMARKS} benchmarks above chance and a rung at which ability has surely fallen but not vanished."
    )
    outcome, too_few = weighed(votes, counted)
    return Verdict(question="rq4", key="F4.4", statement=statement, outcome=outcome, reason=reason + too_few, table=tuple(rows))


# -- muting ----------------------------------------------------------------------------------------------------------------


def muting(methods: Sequence[Series]) -> Verdict:
    """The muting effect: after very many edits a model writes nothing, or repeats itself.

    For it is a share of such texts surely above a half, and surely above that of the unedited model: some write little to begin with.
    """
    statement = "After 10,000 edits the edited models are mute: most of what they write is empty or repeats itself."
    cast, counted = [], []
    rows = [("model", "method", "data set", "edits", "degenerate texts", "95% interval", "unedited")]
    for one in methods:
        rates = broken_texts(one)
        if rates:
            rung, rate = max(rates.items(), key=lambda found: found[0])
            before = rates.get(0)
            unedited = "–" if before is None else format_number(before.value)
            rows.append((*names_of(one), str(rung), format_number(rate.value), range_of(rate), unedited))
            if rung >= 10 * THOUSANDS:
                counted.append(one)
                above = MUTED if before is None else max(MUTED, before.high)
                cast.append((voter_of(one), decided(rate, above=above, below=MUTED)))
    votes = by_majority(cast)
    reason = (
        f"Of {votes.total} methods on models: {votes}."
        if votes.total
        else "No series reaches 10,000 edits; the curve below shows the rungs that there are."
    )
    outcome, too_few = weighed(votes, counted)
    return Verdict(question="rq1", key="F-mute", statement=statement, outcome=outcome, reason=reason + too_few, table=tuple(rows))


def broken_texts(one: Series) -> dict[int, Interval]:
    """Return the share of degenerate texts at each rung of all runs, a mean over benchmarks, with Wilson's interval over texts and orders.

    The texts of one order are counted, for the same are asked of the next. B benchmarks of n_b texts that weigh the same are as good as
    B^2 / sum 1 / n_b texts (Kish 1965).
    """
    shares = sign_by_run(one, lambda signs: signs.broken_texts)
    return {rung: share_over_orders(fmean(orders), orders, _texts(one, rung)) for rung, orders in shares.items()}


def _texts(one: Series, rung: int) -> float:
    sizes = [[signs.texts for (at, _), signs in run.degenerate.items() if at == rung and signs.texts] for run in one.runs]
    return min(len(mine) ** 2 / sum(1 / size for size in mine) for mine in sizes)


def sign_by_run(one: Series, read: Callable[[Degenerate], float | None]) -> dict[int, tuple[float, ...]]:
    """Return, at each rung that all runs have, a sign of degenerate output: of each run the mean over its benchmarks."""
    found: dict[int, tuple[float, ...]] = {}
    for rung in (0, *one.rungs):
        values = [
            [value for (at, _), signs in run.degenerate.items() if at == rung and (value := read(signs)) is not None] for run in one.runs
        ]
        if all(values):
            found[rung] = tuple(map(fmean, values))
    return found
