"""Fixed subsets of a task: the same items at every rung, in every run, on every machine."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from editeval.types import seed_for

MAX_STRATA = 20  # more distinct labels than this are answers, not classes


def stratified_subset(labels: Sequence[str], size: int, *, seed: int, name: str) -> list[int]:
    """Return the indices (ascending) of `size` items in which every label keeps its share.

    Subsets nest: a smaller one is part of a larger one of the same seed and name. `labels` are the items' gold answers; where they
    are too many to be classes, the subset is a plain random one.
    """
    if size >= len(labels):
        return list(range(len(labels)))
    if len(set(labels)) > MAX_STRATA:
        labels = [""] * len(labels)
    generator = random.Random(seed_for("subset", seed, name, len(labels)))
    strata: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        strata[label].append(index)
    ranked: list[tuple[float, float, int]] = []
    for label in sorted(strata):
        members = strata[label]
        generator.shuffle(members)
        # Item k of a stratum of n stands at (k + 1/2) / n: any prefix of the merged order holds each label in proportion.
        ranked.extend(((place + 0.5) / len(members), generator.random(), index) for place, index in enumerate(members))
    return sorted(index for *_, index in sorted(ranked)[:size])
