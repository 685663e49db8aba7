"""Greedy decoding in padded batches with the model's own attention and cache: for models that do not take ours.

Legend: B live rows, T tokens so far (padding on the left).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.adapters import PassAdapter, PromptPath
from editeval.inference.endings import Ending, Live
from editeval.inference.forward import input_device
from editeval.inference.plan import ScoringPlan

CACHE_BATCHES = 4  # live rows x (context + new tokens) may be this many times `batch_tokens`: they are cached, not computed at once


def decode_padded(
    module: PreTrainedModel,
    rows: Sequence[Live],
    ending: Ending,
    plan: ScoringPlan,
    adapter: PassAdapter | None,
    *,
    max_new_tokens: int,
) -> None:
    """Continue all rows to their ends: fills their `generated`. Finished rows leave their batch."""
    for batch in _batches(rows, plan.batch_tokens, max_new_tokens):
        _decode_batch(module, batch, ending, adapter)


def _batches(rows: Sequence[Live], batch_tokens: int, max_new_tokens: int) -> Iterator[list[Live]]:
    """Yield batches of like length, longest first."""
    batch: list[Live] = []
    width = 0
    for row in sorted(rows, key=lambda row: (-len(row.context), row.context)):
        size = len(batch) + 1
        full = size * width > batch_tokens or size * (width + max_new_tokens) > CACHE_BATCHES * batch_tokens
        if batch and full:
            yield batch
            batch = []
        width = width if batch else len(row.context)
        batch.append(row)
    if batch:
        yield batch


def _decode_batch(module: PreTrainedModel, rows: list[Live], ending: Ending, adapter: PassAdapter | None) -> None:
    device = input_device(module)
    takes_positions = "position_ids" in inspect.signature(module.forward).parameters
    width = max(len(row.context) for row in rows)
    # Padding stands on the left and is masked; any token will do.
    tokens_BT = torch.tensor([row.context[:1] * (width - len(row.context)) + row.context for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row.context)) + [1] * len(row.context) for row in rows], device=device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = None
    live = rows
    while live:
        extra = {"position_ids": positions_BT} if takes_positions else {}
        with _acting(adapter, module, live, width=width, reading=cache is None):
            output = module(input_ids=tokens_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
        cache = output.past_key_values
        next_B = output.logits[:, -1].float().argmax(-1)
        for row, token in zip(live, next_B.tolist(), strict=True):
            row.generated.append(token)
        going = [place for place, row in enumerate(live) if not ending.reached(row)]
        tokens_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(live), 1)], dim=1)
        if len(going) < len(live):
            keep = torch.tensor(going, device=device, dtype=torch.int64)
            cache.batch_select_indices(keep)
            tokens_BT, mask_BT, positions_BT = _select(keep, tokens_BT, mask_BT, positions_BT)
            live = [live[place] for place in going]


def _acting(
    adapter: PassAdapter | None, module: PreTrainedModel, live: Sequence[Live], *, width: int, reading: bool
) -> AbstractContextManager[None]:
    """Return the context in which the adapter acts on a pass: on the contexts (padded to `width`), or on the new tokens."""
    if adapter is None or not (reading or adapter.every_step):
        return nullcontext()
    if not reading:
        return adapter.active(module, [PromptPath(row=place, nodes=(0,), choice=row.choice) for place, row in enumerate(live)])
    paths = []
    for place, row in enumerate(live):
        size = len(row.context)
        query = adapter.query_position(prompt_tokens=size, tokens=size)
        paths.append(PromptPath(row=place, nodes=tuple(range(width - size, width - size + query + 1)), choice=row.choice))
    return adapter.active(module, paths)


def _select(keep: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[keep] for tensor in tensors)
