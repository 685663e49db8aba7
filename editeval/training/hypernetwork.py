"""MEND's editor network: a plain gradient in, an update that edits out (Mitchell et al. 2022, arXiv:2110.11309, section 3).

The gradient of a linear map's weight is a sum over tokens, sum_i delta_i u_i^T: u what goes into the map, delta the gradient at its output.
The network maps each pair separately. With z the pair, normalised by running statistics of training and joined to one vector,

    h  = z + relu(s1 * (U1 V1 z + b1) + o1)         (equation 3)
    z~ = h + relu(s2 * (U2 V2 h + b2) + o2)         z~ = (u~, delta~)

and the update of the map is -alpha sum_i delta~_i u~_i^T. U, V and b are shared by all maps of one shape; s, o (scale and shift) and
the rate alpha belong to one map. With U = b = o = 0 in the beginning z~ = z: an untrained network writes the normalised gradient.
V's elements start with a standard deviation of 1, as in the published code: how far a step of U moves z~ grows with |V z|.

Shapes: N tokens, I and O the widths of a map's input and output, W = I + O, R the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editeval.edits.delta import LowRankDelta
from editeval.keyvalue.features import Features
from editeval.types import seed_for

EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class NamedMap:
    """A linear map that is edited: its path and its widths."""

    path: str
    d_in: int
    d_out: int

    @property
    def shape(self) -> str:
        """What maps share a network by."""
        return f"{self.d_out}x{self.d_in}"


@dataclass(frozen=True, kw_only=True)
class Factors:
    """An update as it is summed: left (d_out, N) @ right (N, d_in)."""

    left: Tensor
    right: Tensor


class Hypernetwork(nn.Module):
    """The networks and rates of all edited maps."""

    def __init__(self, maps: Sequence[NamedMap], *, rank: int, rate: float, seed: int, v_std: float | None = 1.0) -> None:
        """Make the networks; `v_std` is the standard deviation of V's elements, None: 1 / sqrt(W)."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed_for("hypernetwork", seed))
        by_shape: dict[str, list[NamedMap]] = {}
        for edited in maps:
            by_shape.setdefault(edited.shape, []).append(edited)
        self._place = {edited.path: (shape, number) for shape, group in by_shape.items() for number, edited in enumerate(group)}
        self.networks = nn.ModuleDict(
            {
                shape: PairNetwork(group[0], rank=rank, num_maps=len(group), v_std=v_std, generator=generator)
                for shape, group in by_shape.items()
            }
        )
        self.rates = nn.ParameterDict({shape: nn.Parameter(torch.full((len(group),), rate)) for shape, group in by_shape.items()})

    def observe(self, features: Mapping[str, Features]) -> None:
        """Add these pairs to the running statistics; in training alone."""
        for path, pairs in features.items():
            self._network(path).observe(_effective(pairs))

    def forward(self, features: Mapping[str, Features]) -> dict[str, Factors]:
        """Return the update of each map, by path; tokens without a gradient are left out."""
        found = {}
        for path, pairs in features.items():
            shape, number = self._place[path]
            inputs_NI, gradients_NO = self._network(path)(_effective(pairs), number)
            found[path] = Factors(left=-self.rates[shape][number] * gradients_NO.T, right=inputs_NI)
        return found

    def deltas(self, features: Mapping[str, Features]) -> tuple[LowRankDelta, ...]:
        """Return the update as what an edit records."""
        with torch.no_grad():
            factors = self(features)
        return tuple(
            LowRankDelta(parameter=f"{path}.weight", left=pair.left.float().cpu().contiguous(), right=pair.right.float().cpu().contiguous())
            for path, pair in factors.items()
        )

    def _network(self, path: str) -> PairNetwork:
        network = self.networks[self._place[path][0]]
        assert isinstance(network, PairNetwork)
        return network


class PairNetwork(nn.Module):
    """The network of all maps of one shape, with the running statistics of what goes into them."""

    inputs_count: Tensor

    def __init__(self, edited: NamedMap, *, rank: int, num_maps: int, v_std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        self.d_in = edited.d_in
        width = edited.d_in + edited.d_out
        self.first = LowRankLayer(width, rank=rank, num_maps=num_maps, v_std=v_std, generator=generator)
        self.second = LowRankLayer(width, rank=rank, num_maps=num_maps, v_std=v_std, generator=generator)
        for name, size in (("inputs", edited.d_in), ("gradients", edited.d_out)):
            self.register_buffer(f"{name}_count", torch.zeros((), dtype=torch.float64))
            self.register_buffer(f"{name}_mean", torch.zeros(size, dtype=torch.float64))
            self.register_buffer(f"{name}_squares", torch.zeros(size, dtype=torch.float64))

    def observe(self, pairs: Features) -> None:
        """Add tokens to mean and sum of squared deviations (Chan, Golub and LeVeque 1979: merging two samples)."""
        for name, values_NX in (("inputs", pairs.inputs), ("gradients", pairs.gradients)):
            values = values_NX.detach().to(self.inputs_count.device, torch.float64)
            count, mean, squares = (self.get_buffer(f"{name}_{part}") for part in ("count", "mean", "squares"))
            if not len(values):
                continue
            shift = values.mean(dim=0) - mean
            total = count + len(values)
            squares += (values - values.mean(dim=0)).square().sum(dim=0) + shift.square() * count * len(values) / total
            mean += shift * len(values) / total
            count.copy_(total)

    def forward(self, pairs: Features, number: int) -> tuple[Tensor, Tensor]:
        """Return u~ (N, I) and delta~ (N, O) for the map `number` of this shape."""
        joined_NW = torch.cat([self._normalised("inputs", pairs.inputs), self._normalised("gradients", pairs.gradients)], dim=1)
        mapped_NW = self.second(self.first(joined_NW, number), number)
        return mapped_NW[:, : self.d_in], mapped_NW[:, self.d_in :]

    def _normalised(self, name: str, values_NX: Tensor) -> Tensor:
        count, mean, squares = (self.get_buffer(f"{name}_{part}") for part in ("count", "mean", "squares"))
        values = values_NX.to(mean.device)
        if count < 2:
            return values
        deviation = (squares / (count - 1)).sqrt()
        return (values - mean.float()) / (deviation.float() + EPSILON)


class LowRankLayer(nn.Module):
    """z + relu(s * (U V z + b) + o), with s and o of one map."""

    def __init__(self, width: int, *, rank: int, num_maps: int, v_std: float | None, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, width)
        self.reading = nn.Parameter(torch.randn(rank, width, generator=generator) * (width**-0.5 if v_std is None else v_std))
        self.writing = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(num_maps, width))
        self.shift = nn.Parameter(torch.zeros(num_maps, width))

    def forward(self, values_NW: Tensor, number: int) -> Tensor:
        """Return the same shape; the kink at 0 lets gradients through, or U = 0 would never learn."""
        inner_NW = values_NW @ self.reading.T @ self.writing.T + self.bias
        added_NW: Tensor = (self.scale[number] * inner_NW + self.shift[number]).clamp(min=0)
        return values_NW + added_NW


def _effective(pairs: Features) -> Features:
    """Leave out tokens whose gradient is zero: they say nothing, and normalisation would make something of them."""
    kept_N = (pairs.gradients != 0).any(dim=1) & (pairs.inputs != 0).any(dim=1)
    return Features(inputs=pairs.inputs[kept_N], gradients=pairs.gradients[kept_N])
