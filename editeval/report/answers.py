"""What the model wrote before and after the edits, read from the samples on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editeval.runner.table import rung_label

PROTOCOL = "generation"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt with the answers of the unedited and of the edited model; `state` says which edited model."""

    prompt: str
    expected: str
    unedited: str
    edited: str
    passed: bool
    state: str


def answers(samples: Mapping[int, Sequence[Mapping[str, Any]]], *, metric: str, limit: int) -> tuple[Answer, ...]:
    """Return the first prompts of a metric at the largest rung, at most `limit`, spread evenly over the facts.

    A sample counts when it has `prompts`, `expected`, `generated` and `outcomes` of the generation protocol.
    """
    rungs = [rung for rung in sorted(samples) if rung > 0 and samples[rung]]
    if not rungs:
        return ()
    before = {(sample["request_id"], prompt): text for sample in _of(samples.get(0, ()), metric) for prompt, text in _generated(sample)}
    records = _of(samples[rungs[-1]], metric)
    step = max(1, -(-len(records) // limit))
    return tuple(
        Answer(
            prompt=record["prompts"][0],
            expected=record["expected"][0],
            unedited=before.get((record["request_id"], record["prompts"][0]), "").strip(),
            edited=record["generated"][0].strip(),
            passed=bool(record["outcomes"][PROTOCOL][0]),
            state=f"{metric.replace('_', ' ')}, {rung_label(rungs[-1])}",
        )
        for record in records[::step]
    )


def _of(samples: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    needed = {"request_id", "prompts", "expected", "generated", "outcomes"}
    return [sample for sample in samples if sample.get("metric") == metric and needed <= set(sample) and sample["outcomes"].get(PROTOCOL)]


def _generated(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list(zip(sample["prompts"], sample["generated"], strict=True))
