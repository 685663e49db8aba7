"""Deltas of weights as whole matrices: the one place that says what their numbers mean.

The result depends neither on the device nor on the number of threads: a rank-one product is rounded once to float32, a product of higher
rank is summed in float64 first, and Adam rounds as IEEE 754 says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy
import torch
from torch import Tensor

from editeval.edits.adam import adam, new_moments
from editeval.edits.delta import DenseDelta, LowRankDelta, SelectedDelta, TunedDelta, WeightDelta


def dense(delta: WeightDelta, device: torch.device | str = "cpu") -> Tensor:
    """Return dW (d_out, d_in), float32 on `device`."""
    if isinstance(delta, DenseDelta):
        return delta.value.to(device=device, dtype=torch.float32)
    if isinstance(delta, TunedDelta):
        return _tuned(delta, device)
    product = _product(delta.left.to(device=device, dtype=torch.float32), delta.right.to(device=device, dtype=torch.float32))
    if isinstance(delta, LowRankDelta):
        return product
    return torch.where(_unpacked(delta.selected, product.shape).to(device), product, 0.0)


def shape_of(delta: WeightDelta) -> tuple[int, int] | None:
    """Return (d_out, d_in), or None where the delta's tensors do not fit each other."""
    if isinstance(delta, DenseDelta):
        return (delta.value.shape[0], delta.value.shape[1]) if delta.value.ndim == 2 else None
    if delta.left.ndim != 2 or delta.right.ndim != 2:
        return None
    if isinstance(delta, TunedDelta):
        fits = delta.steps.ndim == 2 and all(
            start >= 0 and other >= 0 and start + number <= len(delta.left) and other + number <= len(delta.right)
            for start, other, number in delta.steps.tolist()
        )
        return (delta.left.shape[1], delta.right.shape[1]) if fits else None
    shape = (delta.left.shape[0], delta.right.shape[1])
    fits = delta.left.shape[1] == delta.right.shape[0]
    if isinstance(delta, SelectedDelta):
        fits = fits and delta.selected.shape == (-(-shape[0] * shape[1] // 8),)
    return shape if fits else None


def num_bytes(delta: WeightDelta) -> int:
    """Return the bytes of a delta's tensors."""
    return sum(value.nbytes for value in vars(delta).values() if isinstance(value, Tensor))


def joined(deltas: Sequence[WeightDelta]) -> WeightDelta:
    """Return one delta that is the sum of these, which are of one parameter."""
    if len(deltas) == 1:
        return deltas[0]
    low = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    parameter = deltas[0].parameter
    if len(low) < len(deltas):
        return DenseDelta(parameter=parameter, value=torch.stack([dense(delta) for delta in deltas]).sum(0))
    left, right = torch.cat([delta.left for delta in low], 1), torch.cat([delta.right for delta in low], 0)
    return LowRankDelta(parameter=parameter, left=left, right=right)


def selected_delta(update: LowRankDelta, selected_OI: Tensor) -> SelectedDelta:
    """Return the elements of an update at which `selected_OI` (bool) is true."""
    bits = torch.from_numpy(numpy.packbits(selected_OI.cpu().numpy().reshape(-1)))
    return SelectedDelta(parameter=update.parameter, left=update.left, right=update.right, selected=bits)


class Tuning:
    """A change (d_out, d_in) that Adam makes from zero, step by step, and the gradients that it went by, while they are fewer bytes."""

    def __init__(
        self, shape: Sequence[int], *, learning_rate: float, max_change: float | None, device: torch.device | str, record: bool = True
    ) -> None:
        self.change = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        self._learning_rate = learning_rate
        self._max_change = max_change
        self._moments = new_moments(self.change)
        self._number = 0
        self._tape = _Tape() if record else None

    def step(self, left_ND: Tensor, right_NI: Tensor) -> None:
        """Go on by the gradient sum_n left[n] right[n]^T (float32); no element leaves the box of `max_change`."""
        self._number += 1
        if self._tape is not None:
            self._tape.add(left_ND, right_NI)
            if self._tape.nbytes >= self.change.nbytes:
                self._tape = None
        with torch.no_grad():
            gradient = _product(left_ND.T, right_NI)
            self.change = adam(self.change, gradient, self._moments, step=self._number, learning_rate=self._learning_rate)
            if self._max_change is not None:
                self.change.clamp_(-self._max_change, self._max_change)

    def delta(self, parameter: str) -> WeightDelta:
        """Return the change as the smaller of its two forms."""
        if self._tape is None:
            return DenseDelta(parameter=parameter, value=self.change.detach().cpu())
        left, right, steps = self._tape.tensors()
        return TunedDelta(
            parameter=parameter, left=left, right=right, steps=steps, learning_rate=self._learning_rate, max_change=self._max_change
        )


@dataclass
class _Tape:
    """Gradients as factors; inputs that come again (a map that nothing below has changed) are kept once."""

    lefts: list[Tensor] = field(default_factory=list)
    rights: list[Tensor] = field(default_factory=list)
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, left_ND: Tensor, right_NI: Tensor) -> None:
        left, right = left_ND.detach().cpu(), right_NI.detach().cpu()
        starts = list(accumulate((len(part) for part in self.rights), initial=0))
        same = next((start for part, start in zip(self.rights, starts, strict=False) if torch.equal(part, right)), None)
        if same is None:
            same = starts[-1]
            self.rights.append(right)
            self.nbytes += right.nbytes
        self.steps.append((sum(len(part) for part in self.lefts), same, len(left)))
        self.lefts.append(left)
        self.nbytes += left.nbytes + 24

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.lefts), torch.cat(self.rights), torch.tensor(self.steps, dtype=torch.int64)


def _product(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    return left_OR * right_RI if left_OR.shape[1] == 1 else (left_OR.double() @ right_RI.double()).float()


def _tuned(delta: TunedDelta, device: torch.device | str) -> Tensor:
    left, right = delta.left.to(device), delta.right.to(device)
    shape = (left.shape[1], right.shape[1])
    tuning = Tuning(shape, learning_rate=delta.learning_rate, max_change=delta.max_change, device=device, record=False)
    for start, other, number in delta.steps.tolist():
        tuning.step(left[start : start + number], right[other : other + number])
    return tuning.change


def _unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = int(torch.Size(shape).numel())
    return torch.from_numpy(numpy.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(tuple(shape))
