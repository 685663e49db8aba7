"""Float32 products on a processor, from copies of the weights that are laid out for it.

How fast a few rows are multiplied by a large matrix depends on how the matrix lies. From a copy that oneDNN has packed once it takes half
to a third of the time that torch's own product takes, on a processor of AMD's with AVX-512; on others nothing is gained (BENCHMARKS.md has
the figures). The copies take memory, so there is a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from editeval.types import ConfigError

MOST_BYTES = 4 * 2**30
"""Of all packed copies together, where they pay and nothing else is said. What is packed decides the last bits of a result."""

FEWEST_ELEMENTS = 2**16
"""Smaller matrices are multiplied as they are: their products take less time than the way here."""

MOST_TERMS = 1024
"""Of a sum that one product makes: rounding errors grow with it, and torch's own products add up in blocks too."""

CPU_INFO = Path("/proc/cpuinfo")

COPIES = 2
"""Of a matrix that gradients go through: as it is, and transposed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Packed:
    """A weight (d_out, d_in) as it was at an address and a version."""

    weight: Tensor
    address: int
    version: int

    @cached_property
    def forward(self) -> tuple[Tensor, ...]:
        return _pack(self.weight)

    @cached_property
    def backward(self) -> tuple[Tensor, ...]:
        return _pack(self.weight.T)


class PackedWeights:
    """Packed copies of large matrices, made when they are first used and made again after a matrix has changed."""

    def __init__(self, *, most_bytes: int | None = None, fewest_elements: int = FEWEST_ELEMENTS) -> None:
        self._most_bytes = allowed_bytes(None) if most_bytes is None else most_bytes
        self._fewest_elements = fewest_elements
        self._packed: dict[int, _Packed] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def another(self) -> PackedWeights:
        """Return one with the same limits and no copies, for another model: each keeps copies of the matrices that it last multiplied."""
        return PackedWeights(most_bytes=self._most_bytes, fewest_elements=self._fewest_elements)

    @contextmanager
    def products(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within the context the linear maps in `modules` multiply from packed copies, the first of them as far as the memory goes.

        Where nothing can be packed (another dtype or device, a build of torch without oneDNN), or a gradient of the
        weight itself is asked for, nothing changes.
        """
        chosen = packable(modules, most_bytes=self._most_bytes, fewest_elements=self._fewest_elements)
        for gone in self._packed.keys() - chosen.keys():
            del self._packed[gone]
        if not chosen:
            yield
            return
        with _Products(self, chosen):
            yield

    def of(self, parameter: Tensor, *, turned: bool) -> _Packed:
        """Return the copies of a parameter as it is now; `turned`: it is stored (d_in, d_out)."""
        known = self._packed.get(id(parameter))
        if known is None or (known.address, known.version) != (parameter.data_ptr(), parameter._version):
            weight = parameter.detach()
            known = _Packed(weight=weight.T if turned else weight, address=weight.data_ptr(), version=parameter._version)
            self._packed[id(parameter)] = known
        return known


def packable(modules: Iterable[nn.Module], *, most_bytes: int, fewest_elements: int) -> dict[int, Tensor]:
    """Return the weights of linear maps that would be packed, by identity, in the order of `modules`."""
    chosen: dict[int, Tensor] = {}
    if not can_pack():
        return chosen
    left = most_bytes
    for linear in (part for module in modules for part in module.modules() if isinstance(part, nn.Linear | Conv1D)):
        weight = linear.weight
        fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= fewest_elements
        fits = fits and not weight.is_inference()  # whether such a tensor was written to cannot be told
        size = packed_bytes(weight.numel())
        if fits and id(weight) not in chosen and size <= left:
            chosen[id(weight)] = weight
            left -= size
    return chosen


@cache
def can_pack() -> bool:
    """Return whether this build of torch multiplies by packed weights: it has oneDNN, and what inductor calls it by."""
    try:
        return torch.equal(_linear(torch.eye(2), _pack(torch.eye(2)), None), torch.eye(2))
    except (AttributeError, RuntimeError):
        return False


def packed_bytes(elements: int) -> int:
    """Return what the copies of a matrix take at most."""
    return COPIES * 4 * elements


def allowed_bytes(gib: object) -> int:
    """Return the bytes that `engine.packed_gib` allows; None: `MOST_BYTES` on a processor of AMD's with AVX-512, and none on another.

    Raises:
        ConfigError: no number, or a negative one.
    """
    if gib is None:
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return MOST_BYTES if wide and maker() == "AuthenticAMD" else 0  # torch's own library is tuned for Intel's
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 <= gib < inf:
        raise ConfigError(f"engine.packed_gib={gib!r} must be a number of at least 0 (GiB; 0 packs nothing)")
    return round(gib * 2**30)


def maker() -> str:
    """Return who made the processor, as Linux has it; empty where that cannot be read."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def all_packed(weights: int, *, element_bytes: int) -> int:
    """Return the bytes that the copies of a model's matrices take on a processor where as many are allowed as there can be."""
    return COPIES * weights if element_bytes == 4 else 0


class _Products(TorchFunctionMode):
    """Sends the products of chosen weights to their packed copies: `nn.Linear` multiplies by `linear`, `Conv1D` by `addmm`."""

    def __init__(self, packed: PackedWeights, chosen: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._packed = packed
        self._chosen = chosen

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            if func is functional.linear and self._is_packed(args[1]):
                return self._product(args[0], args[1], args[2] if len(args) > 2 else None, turned=False)
            if func is torch.addmm and self._is_packed(args[2]):
                return self._product(args[1], args[2], args[0], turned=True)
        return func(*args, **(kwargs or {}))

    def _is_packed(self, weight: Tensor) -> bool:
        return id(weight) in self._chosen and not (weight.requires_grad and torch.is_grad_enabled())

    def _product(self, states: Tensor, parameter: Tensor, bias: Tensor | None, *, turned: bool) -> Tensor:
        packed = self._packed.of(parameter, turned=turned)
        bias = None if bias is None else bias.detach()
        if torch.is_grad_enabled() and states.requires_grad:
            product: Tensor = _Product.apply(states, packed, bias)  # type: ignore[no-untyped-call]
            return product
        return _linear(states.detach(), packed.forward, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, packed: _Packed, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return _linear(states, packed.forward, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _linear(gradients[0], ctx.packed.backward, None), None, None


def _pack(weight_OI: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), None) for part in torch.split(weight_OI, MOST_TERMS, dim=1))


def _linear(states: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    product: Tensor | None = None
    for part, weight in zip(torch.split(states, MOST_TERMS, dim=-1), packed, strict=True):
        added = torch.ops.mkldnn._linear_pointwise(part.contiguous(), weight, bias if product is None else None, "none", [], "")
        product = added if product is None else product.add_(added)
    assert product is not None
    return product
