"""How a model is run: which form of sharing it takes, tried on a few tokens, and how much goes into one pass."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.attention import chunk_nodes_on, layout_of
from editeval.inference.encoding import TokenPair
from editeval.inference.forward import forward, input_device
from editeval.inference.packing import PackingRules, pack

_LOGGER = logging.getLogger(__name__)

LOGIT_BUDGET = 1 << 27  # logits of one pass (scored nodes x vocabulary): 512 MB in float32
TRIAL_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """How to run a model: tokens of a pass, how trees attend (`in_pieces` of `chunk_nodes`: see `attention.py`), the rules of packing."""

    batch_tokens: int
    in_pieces: bool
    chunk_nodes: int
    rules: PackingRules

    def halved(self) -> ScoringPlan | None:
        """Return the plan with half the tokens and scored nodes of a pass; None where one token is left."""
        if self.batch_tokens == 1:
            return None
        rules = replace(
            self.rules,
            row_tokens=max(1, self.rules.row_tokens // 2),
            fill_tokens=max(1, self.rules.fill_tokens // 2),
            row_scored=max(1, self.rules.row_scored // 2),
        )
        return replace(self, batch_tokens=self.batch_tokens // 2, rules=rules)


def plan_for(module: PreTrainedModel, *, batch_tokens: int, max_length: int) -> ScoringPlan:
    """Return the plan for a model: trees that attend in pieces where it takes our attention, else trees under a dense mask where it
    honours one, else chains, which need neither.

    The trial runs the model a few times: call it on the unedited model, so that the composition of batches is the same along a
    trajectory.
    """
    name, width = module.config.model_type, int(module.config.hidden_size)
    chunk_nodes = chunk_nodes_on(input_device(module))
    row_scored = max(1, LOGIT_BUDGET // int(module.config.vocab_size))
    depth = min(max_length, _attention_window(module))
    if depth < max_length:
        _LOGGER.info("%s has layers that see %d tokens back: longer sequences share nothing and run as the model has it", name, depth)
    if _honours_trees(module, depth=depth, in_pieces=True):
        rules = PackingRules(row_tokens=batch_tokens, fill_tokens=batch_tokens, row_scored=row_scored, branch_depth=depth, token_price=None)
        return ScoringPlan(batch_tokens=batch_tokens, in_pieces=True, chunk_nodes=chunk_nodes, rules=rules)
    if _honours_trees(module, depth=depth, in_pieces=False):
        _LOGGER.info("%s does not take our attention: shared beginnings are computed once under a dense mask", name)
    else:
        _LOGGER.info("%s does not take tree masks: each sequence gets its own row", name)
        depth = 0
    row_tokens = min(batch_tokens, max_length)
    # Per layer and token, matrix products cost some 24 h^2 operations and a query-key pair 4 h; matrix products run faster, hence 4 h.
    token_price = 4 * width
    rules = PackingRules(
        row_tokens=row_tokens,
        fill_tokens=min(row_tokens, token_price // 8),
        row_scored=row_scored,
        branch_depth=depth,
        token_price=token_price,
    )
    return ScoringPlan(batch_tokens=batch_tokens, in_pieces=False, chunk_nodes=chunk_nodes, rules=rules)


def _attention_window(module: PreTrainedModel) -> int:
    """Return how deep a tree may be before some layer's window forgets its root (our attention, or a mask, replaces that window)."""
    config = module.config
    names = ("sliding_window", "attention_chunk_size", "window_size")
    sizes = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    return min(sizes, default=1 << 30)


@torch.no_grad()
def _honours_trees(module: PreTrainedModel, *, depth: int, in_pieces: bool) -> bool:
    """Return whether a small tree gives the same predictions as its branches one by one."""
    if depth < TRIAL_DEPTH or "position_ids" not in inspect.signature(module.forward).parameters:
        return False
    vocab_size = int(module.config.vocab_size)
    tokens = [1 + (7 * number) % (vocab_size - 1) for number in range(8)]
    branches = [TokenPair(context=tuple(tokens[:2]), continuation=tuple(tokens[start : start + 3])) for start in (2, 5)]
    rules = PackingRules(row_tokens=16, fill_tokens=1, row_scored=16, branch_depth=TRIAL_DEPTH, token_price=None)
    try:
        rows = pack(branches, rules)
        # Pieces of two nodes, so that the root is a trunk.
        packed = forward(module, rows, layout=layout_of(rows[0], chunk_nodes=2) if in_pieces else None).float()
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
        _LOGGER.info("%s refused a trial of trees%s: %s", module.config.model_type, " in pieces" if in_pieces else "", error)
        return False
    single = [forward(module, pack([branch], rules), layout=None).float() for branch in branches]
    # The shared root comes first in the tree and in both branches; branches follow in the order of their tokens.
    return _near(packed, torch.cat([single[0], single[1][1:]]), dtype=module.dtype)


def _near(found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    scale = max(float(expected.abs().max()), 1.0)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * scale)
