"""Greedy decoding of many contexts at once: each is read once, and leaves the batch when its text has ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.inference.adapters import PassAdapter
from editeval.inference.endings import Ending, GenerationLimits, Live
from editeval.inference.live import decode_live
from editeval.inference.padded import decode_padded
from editeval.inference.plan import ScoringPlan
from editeval.types import EditevalError


@torch.no_grad()
def generate_greedy(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    contexts: Sequence[tuple[int, ...]],
    limits: GenerationLimits,
    plan: ScoringPlan,
    *,
    adapter: PassAdapter | None = None,
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
    rows = {context: Live(context=context) for context in dict.fromkeys(context[-room:] for context in contexts)}
    ending = Ending(module, tokenizer, limits)
    live: list[Live] = []
    padded: list[Live] = []
    for row in rows.values():
        # Beyond a sliding window only the model's own attention forgets what it must.
        fits = plan.in_pieces and len(row.context) + limits.max_new_tokens <= plan.rules.branch_depth
        (live if fits else padded).append(row)
    decode_live(module, live, ending, plan, adapter, max_new_tokens=limits.max_new_tokens)
    decode_padded(module, padded, ending, plan, adapter, max_new_tokens=limits.max_new_tokens)
    return [ending.text(rows[context[-room:]]) for context in contexts]
