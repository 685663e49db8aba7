"""An edit comes back from its bytes as it went in, and equal edits have equal bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from editeval.edits import encoding
from editeval.edits.delta import Delta, DenseDelta, Edit, LowRankDelta
from editeval.edits.encoding import DELTA_KINDS, DTYPES, Layout, encode
from editeval.types import JournalError
from tests.edits.writers import make_edit


def decoded(edit: Edit) -> Edit:
    encoded = encode(edit)
    return Layout.parse(encoded.layout).decode(memoryview(b"".join(encoded.tensors)))


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES.values() if dtype is not torch.bool]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    data = draw(st.binary(min_size=math.prod(shape) * dtype.itemsize, max_size=math.prod(shape) * dtype.itemsize))
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


@given(left=tensors(), right=tensors(), value=tensors(), auxiliary=st.dictionaries(st.text(max_size=5), tensors(), max_size=3))
def test_tensors_come_back_bit_for_bit(left: Tensor, right: Tensor, value: Tensor, auxiliary: dict[str, Tensor]) -> None:
    deltas = (LowRankDelta(parameter="a", left=left, right=right), DenseDelta(parameter="b", value=value))
    back = decoded(Edit(deltas=deltas, auxiliary=auxiliary))
    low_rank, dense = back.deltas
    assert isinstance(low_rank, LowRankDelta)
    assert isinstance(dense, DenseDelta)
    assert (low_rank.parameter, dense.parameter) == ("a", "b")
    assert sorted(back.auxiliary) == sorted(auxiliary)
    pairs = [(left, low_rank.left), (right, low_rank.right), (value, dense.value)]
    pairs += [(auxiliary[name], back.auxiliary[name]) for name in auxiliary]
    for sent, received in pairs:
        assert (received.dtype, received.shape, raw(received)) == (sent.dtype, sent.shape, raw(sent))


def test_bytes_depend_neither_on_strides_nor_on_the_order_of_auxiliary_names() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    keys, count = torch.ones(2), torch.tensor(3)
    one = encode(Edit(deltas=(DenseDelta(parameter="w", value=value),), auxiliary={"keys": keys, "count": count}))
    other = encode(Edit(deltas=(DenseDelta(parameter="w", value=value.T.contiguous().T),), auxiliary={"count": count, "keys": keys}))
    assert (one.layout, b"".join(one.tensors)) == (other.layout, b"".join(other.tensors))


def test_what_was_encoded_does_not_follow_later_changes_of_the_tensor() -> None:
    value = torch.ones(2, 2)
    encoded = encode(Edit(deltas=(DenseDelta(parameter="w", value=value),)))
    value.zero_()
    assert b"".join(encoded.tensors) == raw(torch.ones(2, 2))


def test_gradients_are_left_behind() -> None:
    back = decoded(Edit(deltas=(DenseDelta(parameter="w", value=torch.ones(1, 1, requires_grad=True)),)))
    assert isinstance(back.deltas[0], DenseDelta)
    assert not back.deltas[0].value.requires_grad


def test_every_kind_of_delta_can_be_recorded() -> None:
    assert set(get_args(Delta)) == set(DELTA_KINDS.values())


@dataclass(frozen=True, kw_only=True)
class NewDelta:
    """A kind that a later method may need: tensors beside plain values."""

    parameter: str
    rows: tuple[int, ...]
    scale: float
    keys: Tensor
    bias: Tensor | None = None


def test_a_new_kind_needs_one_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoding.DELTA_KINDS, "new", NewDelta)
    delta = NewDelta(parameter="w", rows=(3, 1), scale=0.1, keys=torch.eye(2))
    (back,) = decoded(Edit(deltas=(delta,))).deltas  # type: ignore[arg-type]
    assert isinstance(back, NewDelta)
    assert (back.parameter, back.rows, back.scale, back.bias) == ("w", (3, 1), 0.1, None)
    assert torch.equal(back.keys, torch.eye(2))


def test_an_unknown_kind_is_refused_by_name() -> None:
    delta = NewDelta(parameter="w", rows=(), scale=1.0, keys=torch.eye(1))
    with pytest.raises(JournalError, match="NewDelta cannot be recorded; known: low_rank, dense"):
        encode(Edit(deltas=(delta,)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 1, dtype=torch.complex64), "DenseDelta.value is of dtype complex64"),
        (torch.zeros(1, 1, device="meta"), "only dense tensors with data"),
        (torch.eye(2).to_sparse(), "only dense tensors with data"),
    ],
)
def test_a_tensor_that_cannot_be_recorded_is_refused_by_field(tensor: Tensor, message: str) -> None:
    with pytest.raises(JournalError, match=message):
        encode(Edit(deltas=(DenseDelta(parameter="w", value=tensor),)))


def test_a_layout_of_a_later_version_is_refused() -> None:
    layout = encode(make_edit(1)).layout
    with pytest.raises(JournalError, match="kind 'tensor_train' is unknown here"):
        Layout.parse(layout.replace(b"low_rank", b"tensor_train"))
    with pytest.raises(JournalError, match="dtype 'float4' is unknown here"):
        Layout.parse(layout.replace(b"float32", b"float4"))
