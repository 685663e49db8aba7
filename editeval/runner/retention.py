"""The retention matrix: is fact i, once edited, still there after n edits? Read from the samples on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Outcomes of one metric and protocol: `values[i][j]` is fact i (in editing order) at the j-th rung; None where not asked.

    `positions` are the facts' places in the editing order (1-based): a fact of position p is edited from rung p on.
    """

    metric: str
    protocol: str
    positions: tuple[int, ...]
    request_ids: tuple[str, ...]
    rungs: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]

    def description(self) -> str:
        """Return the matrix in words."""
        told = []
        for place, rung in enumerate(self.rungs):
            kept = [row[place] for row in self.values]
            asked = [value for value in kept if value is not None]
            if asked:
                told.append(f"at {rung} edits {sum(value > 0.5 for value in asked)} of {len(asked)}")
        return f"Facts that pass {self.metric} ({self.protocol}), each row a fact in editing order: " + ", ".join(told) + "."


def retention(samples: Mapping[int, Sequence[Mapping[str, Any]]], *, metric: str, protocol: str) -> Retention | None:
    """Return the matrix of a metric from each rung's samples, or None where there are no such samples.

    A sample counts when it names the `position` of its fact and has `outcomes` under the protocol; a fact's value is the mean
    over its prompts.
    """
    found: dict[int, dict[int, float]] = {}
    names: dict[int, str] = {}
    for rung, records in samples.items():
        for record in records:
            if record.get("metric") != metric or "position" not in record:
                continue
            outcomes = [value for value in record.get("outcomes", {}).get(protocol, ()) if value is not None and math.isfinite(value)]
            if outcomes:
                found.setdefault(int(record["position"]), {})[rung] = fmean(outcomes)
                names[int(record["position"])] = str(record["request_id"])
    if not found:
        return None
    positions, rungs = tuple(sorted(found)), tuple(sorted(samples))
    return Retention(
        metric=metric,
        protocol=protocol,
        positions=positions,
        request_ids=tuple(names[position] for position in positions),
        rungs=rungs,
        values=tuple(tuple(found[position].get(rung) for rung in rungs) for position in positions),
    )
