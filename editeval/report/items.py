"""From a cell's samples to outcomes item by item, and to signs of degenerate output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from editeval.benchmarks.degeneracy import degenerate_reasons
from editeval.types import Score

Record = Mapping[str, Any]
BALANCED = "balanced_accuracy"
PLAIN = ("acc", "exact_match")
REPRODUCED = 1e-6  # items are the score's own if their mean is the score


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One value an item, (N,), and the items' names in the same order."""

    names: tuple[str, ...]
    values: NDArray[np.float64]

    def aligned(self, names: Sequence[str]) -> NDArray[np.float64] | None:
        """Return the values in the order of these names, or None if they are other items."""
        if self.names == tuple(names):
            return self.values
        place = {name: index for index, name in enumerate(self.names)}
        if len(names) != len(place) or any(name not in place for name in names):
            return None
        return self.values[[place[name] for name in names]]


@dataclass(frozen=True, kw_only=True)
class Degenerate:
    """Signs of a broken model: the share of texts that are empty or repeat themselves, that of empty ones, that of the commonest choice."""

    texts: int  # that were written
    broken_texts: float | None
    empty_texts: float | None
    commonest_choice: float | None


class Items:
    """The items of a cell. What is asked of them again, by each column and for the unedited model by each run, is worked out once."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._outcomes: dict[tuple[str, str, str, float, bool], Outcomes | None] = {}

    def outcomes(self, score: Score, *, balanced: bool = False) -> Outcomes | None:
        """Return the outcomes behind a score, or None where the samples do not give it.

        `balanced` weights items so that their mean is the mean over the right labels of the share correct. The items' mean must be
        the score's value, or they are not what was scored: the weighted mean where the score is balanced itself, else the plain one.
        """
        key = (score.task, score.metric, score.protocol, score.value, balanced)
        if key not in self._outcomes:
            self._outcomes[key] = _outcomes(self._by_task.get(score.task, self.records), score, balanced=balanced)
        return self._outcomes[key]

    @cached_property
    def degenerate(self) -> Degenerate:
        """What is degenerate in the answers."""
        reasons = [found for record in self._written for found in _reasons(record)]
        chosen = Counter([pick for record in self.records if "log_probs" in record and (pick := choice(record)) is not None])
        return Degenerate(
            texts=len(reasons),
            broken_texts=fmean(bool(found) for found in reasons) if reasons else None,
            empty_texts=fmean("empty" in found for found in reasons) if reasons else None,
            commonest_choice=max(chosen.values()) / chosen.total() if chosen else None,
        )

    @property
    def _written(self) -> Iterable[Record]:
        """The records of texts, one a text: each filter through which a text was read has a record of it."""
        found = [record for record in self.records if "generated" in record]
        first = {(record["task"], record["item"]): record for record in reversed(found) if "filter" in record}
        return [record for record in found if "filter" not in record or first[record["task"], record["item"]] is record]

    @cached_property
    def by_identity(self) -> Mapping[tuple[str, ...], Record]:
        """The item that was asked, by what names it at every rung."""
        return {identity(record): record for record in self.records}

    @cached_property
    def _by_task(self) -> Mapping[Any, Sequence[Record]]:
        found: dict[Any, list[Record]] = {}
        for record in self.records:
            found.setdefault(record.get("task"), []).append(record)
        return found


def choice(record: Record) -> int | None:
    """Return which choice of several the model found likeliest, or None."""
    log_probs = record.get("log_probs", ())
    return log_probs.index(max(log_probs)) if len(log_probs) > 1 and "metrics" in record else None


def identity(record: Record) -> tuple[str, ...]:
    """Return what names an item of a cell at every rung."""
    if "position" in record:
        return (str(record["request_id"]), str(record["metric"]))
    return (str(record.get("task")), str(record.get("item")), str(record.get("filter")))


def _outcomes(records: Sequence[Record], score: Score, *, balanced: bool) -> Outcomes | None:
    found = [(record, value) for record in records if (value := _value(record, score)) is not None]
    names = tuple(_name(record) for record, _ in found)
    if len(names) < 2 or len(set(names)) != len(names):
        return None
    plain = np.asarray([value for _, value in found], float)
    values = plain * _label_weights([str(record.get("target")) for record, _ in found]) if balanced else plain
    scored = values if score.metric == BALANCED else plain
    # A score that is no number is not that of any items.
    return Outcomes(names=names, values=values) if abs(float(scored.mean()) - score.value) <= REPRODUCED else None


def _label_weights(labels: Sequence[str]) -> NDArray[np.float64]:
    """Return the weight of each item with which every right label counts the same, (N,); their mean is 1."""
    counts = Counter(labels)
    return np.array([len(labels) / (len(counts) * counts[label]) for label in labels])


def _reasons(record: Record) -> Iterator[frozenset[str]]:
    """Yield of each text why it is degenerate: as the benchmark found with the model's tokens, else by its words."""
    if "degenerate" in record:
        yield frozenset({"empty", "repeats"} & set(record["degenerate"]))  # what was measured earlier lists `unended` too
        return
    generated = record["generated"]
    for text in (generated,) if isinstance(generated, str) else generated:
        yield frozenset(degenerate_reasons(text, text.split()))


def _name(record: Record) -> str:
    return str(record["request_id"]) if "request_id" in record else f"{record['task']}/{record['item']}"


def _value(record: Record, score: Score) -> float | None:
    """Return the record's outcome under the score's metric and protocol, or None where it has none."""
    if "outcomes" in record:
        if record["metric"] != score.metric:
            return None
        conflict = record.get("conflict") or [False] * len(record["prompts"])
        kept = [
            value
            for value, clashes in zip(record["outcomes"].get(score.protocol, ()), conflict, strict=False)
            if value is not None and not clashes
        ]
        return fmean(kept) if kept else None
    metrics, through = record.get("metrics", {}), record.get("filter", "none")
    # No item is balanced alone: likelihoods and written answers have an accuracy, by these names.
    metric = next((name for name in PLAIN if name in metrics), BALANCED) if score.metric == BALANCED else score.metric
    if through != "none":
        suffix = f"_{through.replace('-', '_')}"
        if not metric.endswith(suffix):
            return None
        metric = metric.removesuffix(suffix)
    value = metrics.get(metric)
    return float(value) if isinstance(value, (int, float)) else None
