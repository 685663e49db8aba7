"""Log-probabilities of continuations: packed rows through the model, logits only where a token is scored.

What does not depend on the weights (rows, their layout, where each score is read) is made once, by `pack_pairs`, and serves every rung.

Legend: N scored nodes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from editeval.inference.adapters import PassAdapter, PromptPath, share_limit
from editeval.inference.attention import Layout, layout_of
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


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows that go through the model together.

    The scored tokens of all members, one after another: `indices[i]` is the row of the pass's logits that predicts token `targets[i]`.
    """

    rows: tuple[Row, ...]
    layout: Layout | None
    indices: NDArray[numpy.int64]
    targets: NDArray[numpy.int64]


@dataclass(frozen=True)
class PackedPairs:
    """Pairs as they go through a model; `queries[i]` is where an adapter looks in pair i (None: there is none)."""

    passes: tuple[Pass, ...]
    queries: tuple[int, ...] | None
    size: int

    @cached_property
    def nbytes(self) -> int:
        """About how much memory this takes."""
        return sum(row.nbytes for one in self.passes for row in one.rows) + sum(16 * len(one.indices) for one in self.passes)


def pack_pairs(pairs: Sequence[TokenPair], plan: ScoringPlan, *, adapter: PassAdapter | None = None) -> PackedPairs:
    """Pack pairs for `score_packed`; under an adapter they share tokens only as far as it acts on both alike."""
    queries = None if adapter is None else tuple(_query_position(adapter, pair) for pair in pairs)
    rows = pack(pairs, plan.rules, share_limit=None if adapter is None or queries is None else share_limit(adapter, queries))
    grouped = batches(rows, batch_tokens=plan.batch_tokens, batch_scored=plan.rules.row_scored, trees_alone=plan.in_pieces)
    return PackedPairs(tuple(_pass(batch, pairs, plan) for batch in grouped), queries, len(pairs))


@torch.no_grad()
def score_packed(module: PreTrainedModel, packed: PackedPairs, *, adapter: PassAdapter | None = None) -> list[ContinuationScore]:
    """Score every pair; a score depends on its own pair alone (up to the rounding of the model's arithmetic).

    `adapter` acts where each request's context ends: the one for which the pairs were packed.
    """
    scores: dict[int, ContinuationScore] = {}
    for one in packed.passes:
        queries = packed.queries
        acting = nullcontext() if adapter is None or queries is None else adapter.active(module, _prompt_paths(one.rows, queries))
        with acting:
            logits_NV = forward(module, one.rows, layout=one.layout)
        scores.update(_read_scores(logits_NV, one))
    return [scores[index] for index in range(packed.size)]


def _query_position(adapter: PassAdapter, pair: TokenPair) -> int:
    """Return where in a pair's tokens the adapter looks; the last token of the continuation is not given to the model."""
    return adapter.query_position(prompt_tokens=pair.prompt_tokens, tokens=len(pair.context) + len(pair.continuation) - 1)


def _pass(rows: Sequence[Row], pairs: Sequence[TokenPair], plan: ScoringPlan) -> Pass:
    indices: list[int] = []
    targets: list[int] = []
    start = 0
    for row in rows:
        place = {node: start + offset for offset, node in enumerate(row.scored)}
        start += len(place)
        for member in row.members:
            indices.extend(place[node] for node in member.nodes)
            targets.extend(pairs[member.pair].continuation)
    in_pieces = plan.in_pieces and rows[0].branches
    return Pass(
        rows=tuple(rows),
        layout=layout_of(rows[0], chunk_nodes=plan.chunk_nodes) if in_pieces else None,
        indices=numpy.asarray(indices, dtype=numpy.int64),
        targets=numpy.asarray(targets, dtype=numpy.int64),
    )


def _prompt_paths(rows: Sequence[Row], queries: Sequence[int]) -> list[PromptPath]:
    """Return the nodes up to every place in a pass where an adapter looks, and those behind it; a place that pairs share once."""
    answers: dict[tuple[int, tuple[int, ...]], set[int]] = {}
    for number, row in enumerate(rows):
        for member in row.members:
            path = path_to(row, member.nodes[-1])
            query = queries[member.pair] + 1
            answers.setdefault((number, path[:query]), set()).update(path[query:])
    return [PromptPath(row=number, nodes=nodes, answer=tuple(sorted(answer))) for (number, nodes), answer in answers.items()]


def _read_scores(logits_NV: Tensor, one: Pass) -> dict[int, ContinuationScore]:
    """Return the scores of a pass from the logits at its scored nodes."""
    log_normalizer_N = torch.cat([chunk.float().logsumexp(-1) for chunk in torch.split(logits_NV, REDUCE_ROWS)])
    greedy_N = logits_NV.argmax(-1)
    index = torch.from_numpy(one.indices).to(logits_NV.device)
    target = torch.from_numpy(one.targets).to(logits_NV.device)
    log_probs = (logits_NV[index, target].float() - log_normalizer_N[index]).tolist()
    is_greedy = (greedy_N[index] == target).tolist()
    scores: dict[int, ContinuationScore] = {}
    position = 0
    for member in (member for row in one.rows for member in row.members):
        span = slice(position, position + len(member.nodes))
        position = span.stop
        scores[member.pair] = ContinuationScore(
            log_prob=math.fsum(log_probs[span]), token_log_probs=tuple(log_probs[span]), token_is_greedy=tuple(is_greedy[span])
        )
    return scores
