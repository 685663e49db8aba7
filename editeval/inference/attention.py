"""Attention over a row of token trees, without a mask over the whole row: pieces that are merged by their log-sum-exp.

A node sees its ancestors. Where many nodes hang below one long chain (questions behind a few-shot prefix, choices behind a question), the
part of their attention that falls on that chain needs no mask: all of them see all of it. So a row is cut into *chunks* that attend
within themselves, and *trunks*, chains that everything below attends to as a whole. With o_i and l_i the output and the log-sum-exp
over one piece of a query's keys, the attention over both pieces is exactly

    l = log(exp l_1 + exp l_2),    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.

The functions here take the place of a model's attention through transformers' table of attention functions; its own code is untouched.

Legend: B rows, H heads, K key-value heads, Q queries, T keys or nodes, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from editeval.inference.packing import Row

Attention = Callable[..., tuple[Tensor, None]]
KeysAndValues = dict[int, tuple[Tensor, Tensor]]
"""Layer -> keys and values (B, K, T, D)."""

CHUNK_NODES = 128
GPU_CHUNK_NODES = 1024
"""Trees up to this size attend under one small mask: cutting them further costs more in calls than it saves in masked pairs.

On a GPU a call costs as much as many more pairs.
"""

NAME = "editeval"  # in transformers' table, while a pass runs
# What the functions below may be given and need not look at. A window is the business of the plan, which keeps rows within it.
HARMLESS_OPTIONS = frozenset({"position_ids", "use_cache", "sliding_window", "cache_position", "output_attentions", "is_causal"})


class UnsupportedAttentionError(NotImplementedError):
    """The model's attention does more than scale, softmax and sum (it caps scores, adds biases or sinks)."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Nodes `start` to `stop`, which attend within themselves: causally, or where `visible` (query, key) allows."""

    start: int
    stop: int
    visible: NDArray[numpy.bool_] | None


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Nodes `start` to `stop`, all of which all nodes from `stop` to `below` see."""

    start: int
    stop: int
    below: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A row cut up: every node is in one chunk, and below any number of trunks."""

    chunks: tuple[Chunk, ...]
    trunks: tuple[Trunk, ...]


def layout_of(row: Row, *, chunk_nodes: int = CHUNK_NODES) -> Layout:
    """Cut a row: trees that fit `chunk_nodes` stay whole and share a chunk with their neighbours, larger ones lose their root chain."""
    ends = _subtree_ends(row)
    chunks: list[Chunk] = []
    trunks: list[Trunk] = []
    regions = [(0, len(row.tokens))]  # of sibling trees
    while regions:
        start, stop = regions.pop()
        node = start
        while node < stop:
            below = ends[node]
            if below - start <= chunk_nodes:
                node = below
                continue
            if node > start:
                chunks.append(_chunk(start, node, ends))
            branch = node + 1
            if below - node > chunk_nodes:
                while branch < below and ends[branch] == below:
                    branch += 1
                chunks.append(Chunk(start=node, stop=branch, visible=None))
                if branch < below:
                    trunks.append(Trunk(start=node, stop=branch, below=below))
                    regions.append((branch, below))
                node = below
            start = node
        if start < stop:
            chunks.append(_chunk(start, stop, ends))
    return Layout(chunks=tuple(chunks), trunks=tuple(trunks))


def chunk_nodes_on(device: torch.device) -> int:
    """Return the size of a chunk that pays on a device."""
    return GPU_CHUNK_NODES if device.type == "cuda" else CHUNK_NODES


class TreeAttention:
    """The attention of one row (B = 1) by its layout. With `keep`, keys and values of every layer stay in `kept`."""

    def __init__(self, layout: Layout, *, dtype: torch.dtype, device: torch.device, keep: bool = False) -> None:
        self._trunks = layout.trunks
        self._chunks = [(chunk, None if chunk.visible is None else additive(chunk.visible, dtype, device)) for chunk in layout.chunks]
        self._keep = keep
        self.kept: KeysAndValues = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Return the outputs (B, T, H, D) for queries (B, H, T, D), keys and values (B, K, T, D)."""
        refuse_unknown(mask, options)
        layer = layer_of(module)
        if self._keep:
            self.kept[layer] = (key, value)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        dtype = torch.promote_types(query.dtype, torch.float32)
        result = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]), dtype=dtype)
        output, log_sum = result.transpose(1, 2), query.new_empty(query.shape[:3], dtype=dtype)
        for chunk, chunk_mask in self._chunks:
            own = slice(chunk.start, chunk.stop)
            seen_by = None if chunk_mask is None else chunk_mask.to(query.device)  # layers may lie on several devices
            output[:, :, own], log_sum[:, :, own] = attend(
                query[:, :, own], key[:, :, own], value[:, :, own], mask=seen_by, causal=seen_by is None, scale=scaling
            )
        for trunk in self._trunks:
            seen, seeing = slice(trunk.start, trunk.stop), slice(trunk.stop, trunk.below)
            part = attend(query[:, :, seeing], key[:, :, seen], value[:, :, seen], mask=None, causal=False, scale=scaling)
            merge_into(output[:, :, seeing], log_sum[:, :, seeing], part)
        return result.to(query.dtype), None


@contextmanager
def attending(module: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Within the context the model attends by this function; afterwards as before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = module.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    module.config._attn_implementation = NAME
    try:
        yield
    finally:
        module.config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS.pop(NAME)


def attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return softmax attention (B, H, Q, D) and its log-sum-exp (B, H, Q), natural logarithm, by the device's kernel."""
    if query.device.type == "cpu":
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return output, log_sum
    if query.device.type == "cuda" and mask is None:  # long pieces have no mask; small ones with one are cheap as they are
        output, padded_log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        return output, padded_log_sum[:, :, : query.shape[2]]
    return plain_attend(query, key, value, mask=mask, causal=causal, scale=scale)


def plain_attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return what `attend` does, written out: right on any device, and the oracle of the kernels, which keep scores in float32 too."""
    scores = (query.float() @ key.float().transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores + additive(numpy.tri(query.shape[2], key.shape[2], dtype=bool), torch.float32, query.device)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def merge_into(output: Tensor, log_sum: Tensor, part: tuple[Tensor, Tensor]) -> None:
    """Bring output and log-sum-exp over some keys, in place, to those over a part's keys too."""
    part_output, part_log_sum = part
    # The two weights add up to one, and the part's is the sigmoid of l_2 - l_1: one pass over the outputs.
    output.lerp_(part_output.to(output.dtype), torch.sigmoid(part_log_sum - log_sum)[..., None].to(output.dtype))
    log_sum.copy_(torch.logaddexp(log_sum, part_log_sum))


def additive(visible: NDArray[numpy.bool_], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 0 where visible, else minus infinity."""
    hidden = torch.from_numpy(~visible)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)


def refuse_unknown(mask: Tensor | None, options: dict[str, Any]) -> None:
    """Raise UnsupportedAttentionError for anything that would change the result."""
    unknown = sorted(name for name, value in options.items() if name not in HARMLESS_OPTIONS and value is not None)
    if options.get("dropout") == 0.0:
        unknown.remove("dropout")
    if mask is not None or unknown:
        raise UnsupportedAttentionError(f"attention with {', '.join(unknown) or 'a mask of its own'}")


def layer_of(module: nn.Module) -> int:
    """Return the number of the layer that an attention belongs to; raises UnsupportedAttentionError where it does not say."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedAttentionError("an attention that does not know its layer")
    return layer


def _chunk(start: int, stop: int, ends: list[int]) -> Chunk:
    nodes = numpy.arange(start, stop)
    visible = (nodes[None] <= nodes[:, None]) & (nodes[:, None] < numpy.asarray(ends[start:stop])[None])
    chain = bool(visible.sum() == len(nodes) * (len(nodes) + 1) // 2)
    return Chunk(start=start, stop=stop, visible=None if chain else visible)


def _subtree_ends(row: Row) -> list[int]:
    """Return, for each node, the node after the last one below it (rows are in depth-first order)."""
    parents = list(range(-1, len(row.tokens) - 1))
    for segment in row.segments:
        parents[segment.start] = segment.ancestors[-1] if segment.ancestors else -1
    ends = list(range(1, len(row.tokens) + 1))
    for node in range(len(row.tokens) - 1, -1, -1):
        if parents[node] >= 0:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return ends
