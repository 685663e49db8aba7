"""Updates as whole matrices, for methods that work on what other methods computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from editeval.edits.delta import Delta, DenseDelta, LowRankDelta, WeightDelta


def weight_deltas(deltas: Sequence[Delta]) -> tuple[WeightDelta, ...]:
    """Return those deltas that are updates of weights."""
    return tuple(delta for delta in deltas if isinstance(delta, LowRankDelta | DenseDelta))


def dense(delta: WeightDelta) -> Tensor:
    """Return dW (d_out, d_in), float32 on the CPU; a product of factors is summed in float64."""
    if isinstance(delta, LowRankDelta):
        return (delta.left.cpu().double() @ delta.right.cpu().double()).float()
    return delta.value.cpu().float()


def dense_by_parameter(deltas: Sequence[WeightDelta]) -> dict[str, Tensor]:
    """Return the sum of all deltas of each parameter."""
    found: dict[str, Tensor] = {}
    for delta in deltas:
        value = dense(delta)
        found[delta.parameter] = found[delta.parameter] + value if delta.parameter in found else value
    return found
