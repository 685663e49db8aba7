"""Rows of token trees through a model: positions, masks where they are needed, logits at the scored nodes alone.

Legend: B rows, T nodes of the longest row, N scored nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.attention import KeysAndValues, Layout, TreeAttention, attending, chunk_nodes_on, layout_of
from editeval.inference.packing import Row, ancestor_mask


def input_device(module: PreTrainedModel) -> torch.device:
    """Return the device that token ids must be on."""
    return next(module.get_input_embeddings().parameters()).device


def forward(module: PreTrainedModel, rows: Sequence[Row], *, layout: Layout | None) -> Tensor:
    """Return the logits (N, V) at the scored nodes, row by row, nodes ascending.

    `layout` says how the one row of trees attends in pieces (see `attention.py`); None: all rows of trees under one dense mask. Chains
    need neither.
    """
    if not rows[0].branches:
        return _logits(module, rows)
    if layout is None:
        return _logits(module, rows, masked=True)
    (row,) = rows
    with attending(module, TreeAttention(layout, dtype=module.dtype, device=input_device(module))):
        return _logits(module, [row])


def read(module: PreTrainedModel, row: Row) -> tuple[Tensor, KeysAndValues]:
    """Return the logits (N, V) at the scored nodes of a row that attends in pieces, and every layer's keys and values of all its nodes."""
    device = input_device(module)
    attention = TreeAttention(layout_of(row, chunk_nodes=chunk_nodes_on(device)), dtype=module.dtype, device=device, keep=True)
    with attending(module, attention):
        return _logits(module, [row]), attention.kept


def _logits(module: PreTrainedModel, rows: Sequence[Row], *, masked: bool = False) -> Tensor:
    device = input_device(module)
    width = max(len(row.tokens) for row in rows)
    # Padding stands on the right, where causal attention never looks; any token will do.
    tokens_BT = numpy.zeros((len(rows), width), dtype=numpy.int64)
    keep_BT = numpy.zeros((len(rows), width), dtype=bool)
    for number, row in enumerate(rows):
        tokens_BT[number] = row.tokens + row.tokens[-1:] * (width - len(row.tokens))
        keep_BT[number, row.scored] = True
    extra: dict[str, Tensor] = {}
    if any(row.branches for row in rows):
        extra["position_ids"] = torch.from_numpy(_positions(rows, width)).to(device)
    if masked:
        extra["attention_mask"] = _dense_mask(module, rows, width).to(device)
    keep = torch.from_numpy(keep_BT).to(device)
    # Every causal model of transformers takes the kept positions (its soft caps and scales are then its own business).
    logits: Tensor = module(input_ids=torch.from_numpy(tokens_BT).to(device), use_cache=False, logits_to_keep=keep, **extra).logits
    return logits


def _positions(rows: Sequence[Row], width: int) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.int64]]:
    positions_BT = numpy.zeros((len(rows), width), dtype=numpy.int64)
    for number, row in enumerate(rows):
        positions_BT[number, : len(row.depths)] = row.depths
    return positions_BT


def _dense_mask(module: PreTrainedModel, rows: Sequence[Row], width: int) -> Tensor:
    """Return the additive mask (B, 1, T, T) of a batch of trees."""
    # Padding sees itself: a query that sees nothing has no softmax.
    visible_BTT = numpy.broadcast_to(numpy.eye(width, dtype=bool), (len(rows), width, width)).copy()
    for number, row in enumerate(rows):
        visible_BTT[number, : len(row.tokens), : len(row.tokens)] = ancestor_mask(row)
    visible = torch.from_numpy(visible_BTT)
    mask = torch.zeros(visible.shape, dtype=module.dtype).masked_fill_(~visible, torch.finfo(module.dtype).min)
    return mask[:, None]
