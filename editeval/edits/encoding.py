"""How an edit becomes bytes: a layout (what there is, of which type and shape) and the raw bytes of its tensors.

Edits of one method on one model share their layout, so a segment of the journal holds each layout once. To add a kind of
delta: its frozen dataclass in `delta.py` (tensors, and plain values that JSON can write), and one line in `DELTA_KINDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from editeval.edits.delta import (
    CodebookDelta,
    Delta,
    DenseDelta,
    Edit,
    LowRankDelta,
    MemoryDelta,
    SelectedDelta,
    SideMemoryDelta,
    TunedDelta,
)
from editeval.types import JournalError

DELTA_KINDS: dict[str, type[Delta]] = {
    "low_rank": LowRankDelta,
    "dense": DenseDelta,
    "tuned": TunedDelta,
    "selected": SelectedDelta,
    "codebook": CodebookDelta,
    "side_memory": SideMemoryDelta,
    "memory": MemoryDelta,
}

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class EncodedEdit:
    """An edit as bytes: its layout's canonical JSON, and its tensors' bytes in the layout's order."""

    layout: bytes
    tensors: tuple[memoryview, ...]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What raw bytes do not say of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything of an edit but its numbers: the deltas' classes with their fields, and the auxiliary tensors' names."""

    text: bytes
    deltas: tuple[tuple[Callable[..., Delta], Mapping[str, Any]], ...]
    auxiliary: Mapping[str, TensorSpec]

    @classmethod
    def parse(cls, text: bytes) -> Layout:
        """Return the layout that canonical JSON describes.

        Raises:
            JournalError: it names a kind of delta or a dtype that this version does not know.
        """
        described = json.loads(text)
        deltas = []
        for delta in described["deltas"]:
            if delta["kind"] not in DELTA_KINDS:
                known = ", ".join(DELTA_KINDS)
                raise JournalError(f"delta of kind {delta['kind']!r} is unknown here; known: {known}; use the version that wrote it")
            values = {name: thawed(value) for name, value in delta["values"].items()}
            values.update({name: _spec(dtype, shape) for name, dtype, shape in delta["tensors"]})
            deltas.append((DELTA_KINDS[delta["kind"]], values))
        auxiliary = {name: _spec(dtype, shape) for name, dtype, shape in described["auxiliary"]}
        return cls(text=text, deltas=tuple(deltas), auxiliary=auxiliary)

    def decode(self, data: memoryview) -> Edit:
        """Return the edit whose tensors' bytes these are; the tensors own their memory, on the CPU.

        Raises:
            JournalError: there are more or fewer bytes than the layout says.
        """
        cursor = _Cursor(data)
        deltas = tuple(
            kind(**{name: cursor.take(value) if isinstance(value, TensorSpec) else value for name, value in values.items()})
            for kind, values in self.deltas
        )
        auxiliary = {name: cursor.take(spec) for name, spec in self.auxiliary.items()}
        if cursor.offset != len(data):
            raise JournalError(f"an edit holds {len(data)} bytes of tensors, its layout says {cursor.offset}")
        return Edit(deltas=deltas, auxiliary=auxiliary)


def encode(edit: Edit) -> EncodedEdit:
    """Return an edit as bytes; equal edits give equal bytes, whatever their strides, device or order of auxiliary names.

    Raises:
        JournalError: a delta is of a kind, or a tensor of a dtype or storage, that cannot be recorded.
    """
    names = {kind: name for name, kind in DELTA_KINDS.items()}
    deltas = []
    tensors: list[Tensor] = []
    for delta in edit.deltas:
        if type(delta) not in names:
            raise JournalError(f"a {type(delta).__name__} cannot be recorded; known: {', '.join(DELTA_KINDS)}; add it to DELTA_KINDS")
        values = {field.name: getattr(delta, field.name) for field in fields(delta)}
        described = [(name, value) for name, value in values.items() if isinstance(value, Tensor)]
        plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        specs = [_describe(f"{type(delta).__name__}.{name}", name, value) for name, value in described]
        deltas.append({"kind": names[type(delta)], "values": plain, "tensors": specs})
        tensors.extend(value for _, value in described)
    remembered = sorted(edit.auxiliary.items())
    auxiliary = [_describe(f"auxiliary {name!r}", name, value) for name, value in remembered]
    tensors.extend(value for _, value in remembered)
    text = json.dumps({"deltas": deltas, "auxiliary": auxiliary}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return EncodedEdit(layout=text.encode(), tensors=tuple(_raw(tensor) for tensor in tensors))


@dataclass
class _Cursor:
    data: memoryview
    offset: int = 0

    def take(self, spec: TensorSpec) -> Tensor:
        raw = self.data[self.offset : self.offset + spec.num_bytes]
        if len(raw) != spec.num_bytes:
            raise JournalError(f"an edit holds {len(self.data)} bytes of tensors, its layout says more")
        self.offset += spec.num_bytes
        if not raw:
            return torch.empty(spec.shape, dtype=spec.dtype)
        # clone: torch's own allocation is aligned like that of a tensor computed live, so kernels take the same path
        return torch.frombuffer(bytearray(raw), dtype=spec.dtype).clone().reshape(spec.shape)


def _describe(where: str, name: str, tensor: Tensor) -> tuple[str, str, list[int]]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise JournalError(f"{where} is of dtype {dtype}, which cannot be recorded; allowed: {', '.join(DTYPES)}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise JournalError(f"{where} is a {tensor.layout} tensor on {tensor.device}; only dense tensors with data can be recorded")
    return name, dtype, list(tensor.shape)


def _spec(dtype: str, shape: list[int]) -> TensorSpec:
    if dtype not in DTYPES:
        raise JournalError(f"a tensor of dtype {dtype!r} is unknown here; known: {', '.join(DTYPES)}; use the version that wrote it")
    return TensorSpec(dtype=DTYPES[dtype], shape=tuple(shape))


def _raw(tensor: Tensor) -> memoryview:
    data = tensor.detach().to("cpu").contiguous().reshape(-1)
    # a copy: what is hashed must be what is written, even if the caller changes the tensor meanwhile
    return memoryview(data.view(torch.uint8).numpy().tobytes())


def thawed(value: Any) -> Any:
    """Return a value of JSON with tuples for its lists: JSON knows no tuples, frozen records hold nothing else."""
    return tuple(thawed(item) for item in value) if isinstance(value, list) else value
