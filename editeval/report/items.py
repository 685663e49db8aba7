"""From a cell's samples to outcomes item by item, and to signs of degenerate output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from editeval.types import Score

Record = Mapping[str, Any]
REPEATED_GRAMS = 0.5  # a text of which more than this share of 4-grams are repeats is degenerate (arXiv 2410.18785, "muting effect")
GRAM = 4
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
    """Signs of a broken model: the share of texts that are empty or repeat themselves, and that of the commonest choice."""

    broken_texts: float | None
    commonest_choice: float | None


def outcomes_of(records: Sequence[Record], score: Score, *, balanced: bool = False) -> Outcomes | None:
    """Return the outcomes behind a score, or None where the samples do not give it.

    `balanced` weights items so that their mean is the mean over the right labels of the share correct; such a mean is not the
    score. Otherwise the items' mean must be the score's value, or they are not what was scored.
    """
    names, values, labels = [], [], []
    tasks = {record.get("task") for record in records}
    for record in records:
        if record.get("task") != score.task and score.task in tasks:
            continue
        value = _value(record, score)
        if value is not None:
            names.append(_name(record))
            values.append(value)
            labels.append(str(record.get("target")))
    if len(values) < 2 or len(set(names)) != len(names):
        return None
    found = np.asarray(values, float)
    if abs(float(found.mean()) - score.value) > REPRODUCED:
        return None
    if balanced:
        counts = Counter(labels)
        found = found * np.array([len(labels) / (len(counts) * counts[label]) for label in labels])
    return Outcomes(names=tuple(names), values=found)


def degenerate(records: Sequence[Record]) -> Degenerate:
    """Return what is degenerate in a cell's answers."""
    texts = [text for record in records for text in _texts(record)]
    chosen = Counter(pick for record in records if (pick := choice(record)) is not None)
    return Degenerate(
        broken_texts=sum(map(is_degenerate, texts)) / len(texts) if texts else None,
        commonest_choice=max(chosen.values()) / chosen.total() if chosen else None,
    )


def is_degenerate(text: str) -> bool:
    """Return whether a text is empty, or repeats itself: more than half of its 4-grams of words are repeats."""
    words = text.split()
    grams = [tuple(words[place : place + GRAM]) for place in range(len(words) - GRAM + 1)]
    return not words or (bool(grams) and 1 - len(set(grams)) / len(grams) > REPEATED_GRAMS)


def choice(record: Record) -> int | None:
    """Return which choice of several the model found likeliest, or None."""
    log_probs = record.get("log_probs", ())
    return max(range(len(log_probs)), key=log_probs.__getitem__) if len(log_probs) > 1 and "metrics" in record else None


def _texts(record: Record) -> Iterator[str]:
    generated = record.get("generated", ())
    yield from (generated,) if isinstance(generated, str) else generated


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
    suffix = "" if record.get("filter", "none") == "none" else f"_{record['filter'].replace('-', '_')}"
    for name, value in record.get("metrics", {}).items():
        if f"{name}{suffix}" == score.metric and isinstance(value, (int, float)):
            return float(value)
    return None
