"""Updates of weights, for methods that work on what other methods computed."""

from __future__ import annotations

from collections.abc import Sequence

from editeval.edits.delta import Delta, WeightDelta
from editeval.edits.dense import joined
from editeval.types import EditError, EditRequest


def joined_by_parameter(deltas: Sequence[WeightDelta]) -> dict[str, WeightDelta]:
    """Return the sum of all deltas of each parameter, as one delta."""
    found: dict[str, list[WeightDelta]] = {}
    for delta in deltas:
        found.setdefault(delta.parameter, []).append(delta)
    return {parameter: joined(parts) for parameter, parts in found.items()}


def weight_deltas(deltas: Sequence[Delta], requests: Sequence[EditRequest]) -> tuple[WeightDelta, ...]:
    """Return the deltas of an edit, all of which must change weights.

    Raises:
        EditError: with the ids of the requests, when one changes an adapter instead.
    """
    found = tuple(delta for delta in deltas if isinstance(delta, WeightDelta))
    if len(found) < len(deltas):
        kinds = ", ".join(sorted({type(delta).__name__ for delta in deltas} - {type(delta).__name__ for delta in found}))
        raise EditError(
            f"the method changes an adapter ({kinds}), which cannot be worked on; choose another, such as method@of=memit",
            request_ids=[request.request_id for request in requests],
        )
    return found
