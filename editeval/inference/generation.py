"""Greedy decoding of many contexts at once, with a key-value cache; finished rows leave the batch.

Legend: B live rows, T tokens so far (padding on the left).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.inference.adapters import ActivationAdapter, Choice, PromptPath
from editeval.inference.forward import input_device
from editeval.types import EditevalError

CACHE_BATCHES = 4  # live rows x (context + new tokens) may be this many times `batch_tokens`: they are cached, not computed at once
STOP_TAIL_TOKENS = 8  # tokens beyond a stop string's length in which it is looked for; the text is cut exactly at the end


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """When decoding ends: new tokens, stop strings, the model's positions, and the tokens of one batch."""

    max_new_tokens: int
    stop: tuple[str, ...]
    max_length: int
    batch_tokens: int


@dataclass(kw_only=True)
class _Live:
    """A context that is being continued."""

    number: int
    context: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)


@torch.no_grad()
def generate_greedy(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    contexts: Sequence[tuple[int, ...]],
    limits: GenerationLimits,
    *,
    adapter: ActivationAdapter | None = None,
) -> list[str]:
    """Return the continuation of each context: special tokens left out, cut before the first stop string.

    `adapter` acts where each context ends, while the contexts are read and not on new tokens (unless it says so itself).

    Equal contexts are decoded once. A context longer than the model's positions less `max_new_tokens` loses tokens on the left.

    Raises:
        EditevalError: no position is left for the context.
    """
    room = limits.max_length - limits.max_new_tokens
    if room < 1:
        raise EditevalError(
            f"max_new_tokens {limits.max_new_tokens} leaves no room for a context in the model's {limits.max_length} positions; "
            f"at most {limits.max_length - 1} are possible"
        )
    unique = list(dict.fromkeys(context[-room:] for context in contexts))
    texts: dict[tuple[int, ...], str] = {}
    for batch in _batches(unique, limits):
        for row in _decode_batch(module, tokenizer, batch, limits, adapter):
            texts[row.context] = cut_at_stop(decode(tokenizer, row.generated), limits.stop)
    return [texts[context[-room:]] for context in contexts]


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Return the text of new tokens, special tokens left out."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the earliest stop string (empty stop strings stop nothing)."""
    found = [position for term in stop if term and (position := text.find(term)) >= 0]
    return text[: min(found)] if found else text


def end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the ids that end a text: the generation config's and the tokenizer's."""
    configured = module.generation_config.eos_token_id if module.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(int(token_id) for token_id in ids)


def _batches(contexts: Sequence[tuple[int, ...]], limits: GenerationLimits) -> Iterator[list[_Live]]:
    """Yield batches of like length, longest first."""
    batch: list[_Live] = []
    width = 0
    for context in sorted(contexts, key=lambda context: (-len(context), context)):
        rows = len(batch) + 1
        full = rows * width > limits.batch_tokens or rows * (width + limits.max_new_tokens) > CACHE_BATCHES * limits.batch_tokens
        if batch and full:
            yield batch
            batch = []
        width = width if batch else len(context)
        batch.append(_Live(number=len(batch), context=context))
    if batch:
        yield batch


def _decode_batch(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[_Live],
    limits: GenerationLimits,
    adapter: ActivationAdapter | None,
) -> list[_Live]:
    """Continue all rows of a batch until each has ended; fills their `generated` and returns them."""
    ends = end_tokens(module, tokenizer)
    device = input_device(module)
    takes_positions = "position_ids" in inspect.signature(module.forward).parameters
    width = max(len(row.context) for row in rows)
    # Padding stands on the left and is masked; any token will do.
    tokens_BT = torch.tensor([row.context[:1] * (width - len(row.context)) + row.context for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (width - len(row.context)) + [1] * len(row.context) for row in rows], device=device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    cache = None
    live = rows
    for step in range(limits.max_new_tokens):
        extra = {"position_ids": positions_BT} if takes_positions else {}
        with _acting(adapter, module, live, width=width, step=step):
            output = module(input_ids=tokens_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
        cache = output.past_key_values
        next_B = output.logits[:, -1].float().argmax(-1)
        going = []
        for place, (row, token) in enumerate(zip(live, next_B.tolist(), strict=True)):
            row.generated.append(token)
            if token not in ends and not _stopped(tokenizer, row.generated, limits.stop):
                going.append(place)
        if not going:
            break
        tokens_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(live), 1)], dim=1)
        if len(going) < len(live):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            tokens_BT, mask_BT, positions_BT = _select(keep, tokens_BT, mask_BT, positions_BT)
            live = [live[place] for place in going]
    return rows


def _acting(
    adapter: ActivationAdapter | None, module: PreTrainedModel, live: Sequence[_Live], *, width: int, step: int
) -> AbstractContextManager[None]:
    """Return the context in which the adapter acts on this step's tokens: on the contexts (padded to `width`) at step 0."""
    if adapter is None or (step > 0 and not adapter.every_step):
        return nullcontext()
    if step > 0:
        return adapter.active(module, [PromptPath(row=place, nodes=(0,), choice=row.choice) for place, row in enumerate(live)])
    paths = []
    for place, row in enumerate(live):
        size = len(row.context)
        query = adapter.query_position(prompt_tokens=size, tokens=size)
        paths.append(PromptPath(row=place, nodes=tuple(range(width - size, width - size + query + 1)), choice=row.choice))
    return adapter.active(module, paths)


def _select(keep: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[keep] for tensor in tensors)


def _stopped(tokenizer: PreTrainedTokenizerFast, generated: list[int], stop: Sequence[str]) -> bool:
    """Return whether the text so far holds a stop string, wherever its tokens' borders are."""
    longest = max((len(term) for term in stop), default=0)
    if not longest:
        return False
    # A stop string of n characters ends in this token and spans few more than n tokens: the tail decides in constant time.
    tail = decode(tokenizer, generated[-(longest + STOP_TAIL_TOKENS) :])
    if not any(term and term in tail for term in stop):
        return False
    text = decode(tokenizer, generated)
    return any(term and term in text for term in stop)
