from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editeval.inference.attention import Layout, TreeAttention, UnsupportedAttentionError, attend, attending, layout_of, plain_attend
from editeval.inference.encoding import TokenPair
from editeval.inference.packing import PackingRules, Row, ancestor_mask, pack
from tests.inference.conftest import Load

SHARED = PackingRules(row_tokens=200, fill_tokens=200, row_scored=200, branch_depth=200, token_price=None)


class Layer(torch.nn.Module):
    """What an attention module tells of itself."""

    layer_idx = 0


LAYER = Layer()

ids = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
some_rows = st.lists(st.builds(TokenPair, context=ids, continuation=ids), min_size=1, max_size=15).map(lambda pairs: pack(pairs, SHARED))


def seen_by_layout(layout: Layout, size: int) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.int64]]:
    """How often each query meets each key in the pieces."""
    counts = numpy.zeros((size, size), dtype=numpy.int64)
    for chunk in layout.chunks:
        own = slice(chunk.start, chunk.stop)
        counts[own, own] += numpy.tri(chunk.stop - chunk.start, dtype=numpy.int64) if chunk.visible is None else chunk.visible
    for trunk in layout.trunks:
        counts[trunk.stop : trunk.below, trunk.start : trunk.stop] += 1
    return counts


@given(rows=some_rows, chunk_nodes=st.integers(1, 30))
def test_pieces_of_a_row_show_every_node_its_ancestors_exactly_once(rows: list[Row], chunk_nodes: int) -> None:
    for row in rows:
        layout = layout_of(row, chunk_nodes=chunk_nodes)
        assert (seen_by_layout(layout, len(row.tokens)) == ancestor_mask(row)).all()
        assert all(chunk.visible is None or chunk.stop - chunk.start <= chunk_nodes for chunk in layout.chunks)


@given(rows=some_rows, chunk_nodes=st.integers(1, 30), seed=st.integers(0, 99))
def test_attention_in_pieces_equals_attention_under_the_whole_mask(rows: list[Row], chunk_nodes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        size = len(row.tokens)
        query = torch.randn(1, 4, size, 8, generator=generator)
        key, value = (torch.randn(1, 2, size, 8, generator=generator) for _ in range(2))
        attention = TreeAttention(layout_of(row, chunk_nodes=chunk_nodes), dtype=torch.float32, device=torch.device("cpu"))
        found, _ = attention(LAYER, query, key, value, None, scaling=0.3)
        mask = torch.zeros(size, size).masked_fill_(~torch.from_numpy(ancestor_mask(row)), float("-inf"))
        expected, _ = plain_attend(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask=mask, causal=False, scale=0.3)
        assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_kernel_of_the_device_equals_the_written_out_attention(device: str, dtype: torch.dtype, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 3, 40, 16, generator=generator).to(device, dtype) for _ in range(3))
    for found, expected in zip(
        attend(query, key, value, mask=None, causal=causal, scale=0.2),
        plain_attend(query, key, value, mask=None, causal=causal, scale=0.2),
        strict=True,
    ):
        assert torch.allclose(found.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_attention_that_does_more_than_softmax_is_refused() -> None:
    attention = TreeAttention(Layout(chunks=(), trunks=()), dtype=torch.float32, device=torch.device("cpu"))
    empty = torch.zeros(1, 1, 0, 4)
    with pytest.raises(UnsupportedAttentionError, match="softcap"):
        attention(LAYER, empty, empty, empty, None, scaling=1.0, dropout=0.0, softcap=50.0, position_ids=empty)
    with pytest.raises(UnsupportedAttentionError, match="mask"):
        attention(LAYER, empty, empty, empty, torch.zeros(1), scaling=1.0)


def test_models_own_attention_is_back_afterwards_even_after_an_error(load_tiny: Load) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = load_tiny("llama").module
    before = module.config._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS)

    def fail(*_: object, **__: object) -> tuple[torch.Tensor, None]:
        assert module.config._attn_implementation != before[0]
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), attending(module, fail):
        module(input_ids=torch.ones(1, 2, dtype=torch.int64, device=module.device))
    assert (module.config._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS)) == before
