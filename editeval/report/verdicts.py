"""What runs say of a statement: for, against, or neither, and in which words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from editeval.report.intervals import Interval
from editeval.report.series import Series
from editeval.runner.table import format_number

KEEPS = 0.9
"""A model keeps an ability if this share of what it had above chance is there."""

DOZENS, THOUSANDS = 100, 1000
"""Dozens of edits are at most, thousands at least so many."""

MIN_METHODS = 3
"""What is said of methods is not decided by fewer of them."""


class Outcome(StrEnum):
    """What the runs say of a statement."""

    CONFIRMED = "CONFIRMED"
    REFUTED = "REFUTED"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A statement, what the runs say of it, why, and the table that this was read from (first row: heads)."""

    question: str
    key: str
    statement: str
    outcome: Outcome
    reason: str
    table: tuple[tuple[str, ...], ...] = ()


@dataclass(kw_only=True)
class Votes:
    """Series for and against a statement, and those that cannot say."""

    yes: list[str] = field(default_factory=list)
    no: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many series there are."""
        return len(self.yes) + len(self.no) + len(self.open)

    @property
    def outcome(self) -> Outcome:
        """What more than half of the voters say."""
        if len(self.yes) > self.total / 2:
            return Outcome.CONFIRMED
        return Outcome.REFUTED if len(self.no) > self.total / 2 else Outcome.UNDECIDED

    def __str__(self) -> str:
        return f"{len(self.yes)} for, {len(self.no)} against, {len(self.open)} open"


def by_majority(cast: Iterable[tuple[str, bool | None]]) -> Votes:
    """Return one vote a voter, which is what most of its ballots say (for, against, or None: open); a tie is open.

    So that a method that was run with three settings has one vote, as one that was run with one.
    """
    ballots: dict[str, list[bool | None]] = {}
    for voter, ballot in cast:
        ballots.setdefault(voter, []).append(ballot)
    votes = Votes()
    for voter, mine in ballots.items():
        bucket = votes.yes if mine.count(True) > len(mine) / 2 else votes.no if mine.count(False) > len(mine) / 2 else votes.open
        bucket.append(voter)
    return votes


def decided(interval: Interval, *, above: float, below: float) -> bool | None:
    """Return whether a number is surely above a limit (True), surely below another (False), or neither (None)."""
    return True if interval.low > above else False if interval.high < below else None


def weighed(votes: Votes, counted: Iterable[Series], *, minimum: int = MIN_METHODS) -> tuple[Outcome, str]:
    """Return what the votes of these series say, and what to add to the reason where too few methods are among them."""
    if votes.total and methods_in(counted) < minimum:
        return Outcome.UNDECIDED, f" At least {minimum} methods are needed."
    return votes.outcome, ""


def methods_in(series: Iterable[Series]) -> int:
    """Return how many methods there are, whatever their settings."""
    return len({one.runs[0].method for one in series})


def voter_of(one: Series) -> str:
    """Return who votes for a series: its method on its model, whatever the settings and the data set."""
    return f"{one.runs[0].method} on {one.model}"


def measured_ones(methods: Sequence[Series]) -> list[Series]:
    """Return the series of which a general ability was measured, or that broke before it could be: verdicts are not of survivors."""
    return [one for one in methods if one.mean or one.first_lost(KEEPS) is not None or one.broke_before_a_rung]


def names_of(one: Series) -> tuple[str, str, str]:
    """Return model, method and data set: the first cells of a row."""
    return one.model, one.method, one.dataset


def label_of(one: Series) -> str:
    """Return how a series is called in a sentence."""
    return f"{one.method} on {one.model}"


def efficacy_at(one: Series, rung: int | None) -> str:
    """Return the share of facts that are there at a rung, and the rung, for a cell."""
    return f"{format_number(one.efficacy[rung].value)} at {rung}" if rung is not None and rung in one.efficacy else "–"


def or_dash(value: int | None) -> str:
    """Return a number for a cell."""
    return "–" if value is None else str(value)


def yes_no(value: bool | None) -> str:
    """Return an answer for a cell."""
    return "–" if value is None else "yes" if value else "no"


def range_of(interval: Interval) -> str:
    """Return the ends of an interval for a cell."""
    return f"{format_number(interval.low)} to {format_number(interval.high)}"
