"""Log-probabilities of continuations: packed rows through the model, logits only where a token is scored.

Legend: N scored nodes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.adapters import ActivationAdapter, PromptPath, share_limit
from editeval.inference.encoding import TokenPair
from editeval.inference.forward import forward
from editeval.inference.packing import Row, batches, pack, path_to
from editeval.inference.plan import ScoringPlan

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


@torch.no_grad()
def score_pairs(
    module: PreTrainedModel, pairs: Sequence[TokenPair], plan: ScoringPlan, *, adapter: ActivationAdapter | None = None
) -> list[ContinuationScore]:
    """Score every pair; a score depends on its own pair alone (up to the rounding of the model's arithmetic).

    `adapter` acts where each pair's context ends; pairs then share tokens only as far as it acts on both alike.
    """
    scores: dict[int, ContinuationScore] = {}
    queries = None if adapter is None else [_query_position(adapter, pair) for pair in pairs]
    rows = pack(pairs, plan.rules, share_limit=None if adapter is None or queries is None else share_limit(adapter, queries))
    for batch in batches(rows, batch_tokens=plan.batch_tokens, batch_scored=plan.rules.row_scored, trees_alone=plan.in_pieces):
        acting = nullcontext() if adapter is None or queries is None else adapter.active(module, _prompt_paths(batch, queries))
        with acting:
            logits_NV = forward(module, batch, in_pieces=plan.in_pieces)
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
