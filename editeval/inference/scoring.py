"""Log-probabilities of continuations: packed rows through the model, logits only where a token is scored.

Legend: B rows, T nodes of the longest row, N scored nodes, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.adapters import ActivationAdapter, PromptPath, share_limit
from editeval.inference.encoding import TokenPair
from editeval.inference.packing import PackingRules, Row, ancestor_mask, batches, pack, path_to

_LOGGER = logging.getLogger(__name__)

LOGIT_BUDGET = 1 << 26  # logits of one pass (N x V): 256 MB in float32
REDUCE_ROWS = 256  # rows of logits per log-sum-exp, whose temporary is as large as its input


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """How likely a continuation is after its context (natural logarithm, summed over its tokens)."""

    log_prob: float
    token_log_probs: tuple[float, ...]
    token_is_greedy: tuple[bool, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the continuation."""
        return len(self.token_log_probs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have produced every token."""
        return all(self.token_is_greedy)


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """How to run a model: token budget of a pass and the rules of packing (see `plan_for`)."""

    batch_tokens: int
    rules: PackingRules


def plan_for(module: PreTrainedModel, *, batch_tokens: int, max_length: int) -> ScoringPlan:
    """Return the plan for a model: trees where it honours tree masks (tried on a few tokens), else chains, which need no mask.

    The trial runs the model twice: call it on the unedited model, so that the composition of batches is the same along a trajectory.
    """
    row_tokens = min(batch_tokens, max_length)
    # Per layer and token, matrix products cost some 24 h^2 operations and a query-key pair 4 h; matrix products run faster, hence 4 h.
    token_price = 4 * int(module.config.hidden_size)
    depth = min(max_length, _attention_window(module))
    if not _honours_trees(module, vocab_size=int(module.config.vocab_size), depth=depth):
        _LOGGER.info("%s does not take tree masks: each sequence gets its own row", module.config.model_type)
        depth = 0
    fill_tokens = min(row_tokens, token_price // 8)
    rules = PackingRules(row_tokens=row_tokens, fill_tokens=fill_tokens, branch_depth=depth, token_price=token_price)
    return ScoringPlan(batch_tokens=batch_tokens, rules=rules)


def input_device(module: PreTrainedModel) -> torch.device:
    """Return the device that token ids must be on."""
    return next(module.get_input_embeddings().parameters()).device


@torch.no_grad()
def score_pairs(
    module: PreTrainedModel, pairs: Sequence[TokenPair], plan: ScoringPlan, *, adapter: ActivationAdapter | None = None
) -> list[ContinuationScore]:
    """Score every pair; a score depends on its own pair alone (up to the rounding of the model's arithmetic).

    `adapter` acts where each pair's context ends; pairs then share tokens only as far as it acts on both alike.
    """
    scores: dict[int, ContinuationScore] = {}
    batch_scored = max(1, LOGIT_BUDGET // int(module.config.vocab_size))
    queries = None if adapter is None else [_query_position(adapter, pair) for pair in pairs]
    rows = pack(pairs, plan.rules, share_limit=None if adapter is None or queries is None else share_limit(adapter, queries))
    for batch in batches(rows, batch_tokens=plan.batch_tokens, batch_scored=batch_scored):
        acting = nullcontext() if adapter is None or queries is None else adapter.active(module, _prompt_paths(batch, queries))
        with acting:
            logits_NV = _forward(module, batch)
        scores.update(_read_scores(logits_NV, batch, pairs))
    return [scores[index] for index in range(len(pairs))]


def _query_position(adapter: ActivationAdapter, pair: TokenPair) -> int:
    """Return where in a pair's tokens the adapter looks; the last token of the continuation is not given to the model."""
    return adapter.query_position(prompt_tokens=len(pair.context), tokens=len(pair.context) + len(pair.continuation) - 1)


def _prompt_paths(rows: Sequence[Row], queries: Sequence[int]) -> list[PromptPath]:
    """Return the nodes up to every place in a batch where an adapter looks, and those behind it; a place that pairs share once."""
    answers: dict[tuple[int, tuple[int, ...]], set[int]] = {}
    for number, row in enumerate(rows):
        for member in row.members:
            path = path_to(row, member.nodes[-1])
            query = queries[member.pair] + 1
            answers.setdefault((number, path[:query]), set()).update(path[query:])
    return [PromptPath(row=number, nodes=nodes, answer=tuple(sorted(answer))) for (number, nodes), answer in answers.items()]


def _read_scores(logits_NV: Tensor, rows: Sequence[Row], pairs: Sequence[TokenPair]) -> dict[int, ContinuationScore]:
    """Return the scores of a batch from the logits at its scored nodes."""
    log_normalizer_N = torch.cat([chunk.float().logsumexp(-1) for chunk in torch.split(logits_NV, REDUCE_ROWS)])
    greedy_N = logits_NV.argmax(-1)
    indices: list[int] = []
    targets: list[int] = []
    start = 0
    for row in rows:
        place = {node: start + offset for offset, node in enumerate(row.scored)}
        start += len(place)
        for member in row.members:
            indices.extend(place[node] for node in member.nodes)
            targets.extend(pairs[member.pair].continuation)
    index = torch.tensor(indices, device=logits_NV.device)
    target = torch.tensor(targets, device=logits_NV.device)
    log_probs = (logits_NV[index, target].float() - log_normalizer_N[index]).tolist()
    is_greedy = (greedy_N[index] == target).tolist()
    scores: dict[int, ContinuationScore] = {}
    position = 0
    for member in (member for row in rows for member in row.members):
        span = slice(position, position + len(member.nodes))
        position = span.stop
        scores[member.pair] = ContinuationScore(
            log_prob=math.fsum(log_probs[span]), token_log_probs=tuple(log_probs[span]), token_is_greedy=tuple(is_greedy[span])
        )
    return scores


def _forward(module: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """Return the logits (N, V) at the scored nodes, row by row, nodes ascending."""
    device = input_device(module)
    width = max(len(row.tokens) for row in rows)
    # Padding stands on the right, where causal attention never looks; any token will do.
    tokens_BT = numpy.zeros((len(rows), width), dtype=numpy.int64)
    keep_BT = numpy.zeros((len(rows), width), dtype=bool)
    for number, row in enumerate(rows):
        tokens_BT[number] = row.tokens + row.tokens[-1:] * (width - len(row.tokens))
        keep_BT[number, row.scored] = True
    keep = torch.from_numpy(keep_BT).to(device)
    extra = _tree_inputs(module, rows, width, device) if rows[0].branches else {}
    # Every causal model of transformers takes the kept positions (its soft caps and scales are then its own business).
    logits: Tensor = module(input_ids=torch.from_numpy(tokens_BT).to(device), use_cache=False, logits_to_keep=keep, **extra).logits
    return logits


def _tree_inputs(module: PreTrainedModel, rows: Sequence[Row], width: int, device: torch.device) -> dict[str, Tensor]:
    """Return position ids (B, T) and the additive mask (B, 1, T, T) of a batch of trees."""
    positions_BT = numpy.zeros((len(rows), width), dtype=numpy.int64)
    # Padding sees itself: a query that sees nothing has no softmax.
    visible_BTT = numpy.broadcast_to(numpy.eye(width, dtype=bool), (len(rows), width, width)).copy()
    for number, row in enumerate(rows):
        size = len(row.tokens)
        positions_BT[number, :size] = row.depths
        visible_BTT[number, :size, :size] = ancestor_mask(row)
    visible = torch.from_numpy(visible_BTT).to(device)
    mask = torch.zeros(visible.shape, dtype=module.dtype, device=device).masked_fill_(~visible, torch.finfo(module.dtype).min)
    return {"position_ids": torch.from_numpy(positions_BT).to(device), "attention_mask": mask[:, None]}


def _attention_window(module: PreTrainedModel) -> int:
    """Return how deep a tree may be before some layer's window forgets its root (a mask given from outside replaces that window)."""
    config = module.config
    names = ("sliding_window", "attention_chunk_size", "window_size")
    sizes = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    return min(sizes, default=1 << 30)


@torch.no_grad()
def _honours_trees(module: PreTrainedModel, *, vocab_size: int, depth: int) -> bool:
    """Return whether a small tree gives the same predictions as its branches one by one."""
    if depth < 4 or "position_ids" not in inspect.signature(module.forward).parameters:
        return False
    tokens = [1 + (7 * number) % (vocab_size - 1) for number in range(8)]
    branches = [TokenPair(context=tuple(tokens[:2]), continuation=tuple(tokens[start : start + 3])) for start in (2, 5)]
    rules = PackingRules(row_tokens=16, fill_tokens=1, branch_depth=4, token_price=1 << 20)
    try:
        packed = _forward(module, pack(branches, rules)).float()
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    single = [_forward(module, pack([branch], rules)).float() for branch in branches]
    # The shared root comes first in the tree and in both branches; branches follow in the order of their tokens.
    expected = torch.cat([single[0], single[1][1:]])
    scale = float(expected.abs().max())
    tolerance = 1e-3 if module.dtype == torch.float32 else 5e-2
    return packed.shape == expected.shape and bool((packed - expected).abs().max() <= tolerance * max(scale, 1.0))
