"""A training row as a hypernetwork learns from it: what is edited, what must follow, and what must stay.

The parts of the model below the edited layers run once a row; the lesson keeps what stands before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from editeval.keyvalue.features import EditingFeatures, editing_features
from editeval.keyvalue.fine_tuning import TargetRow, scored_row
from editeval.keyvalue.lookup import BARE, locate
from editeval.keyvalue.suffix import next_token_logits
from editeval.keyvalue.upper import UpperPass
from editeval.keyvalue.walk import updated
from editeval.models.model import LanguageModel
from editeval.training.hypernetwork import Factors
from editeval.types import DatasetError, EditError, EditRequest

MOST_PROMPTS = 4  # of each kind a row
MOST_TOKENS = 128  # a text
KEPT_LESSONS = 1000  # what stands before the edited layers is kept of so many rows; of more it is computed again


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an update did to a lesson. The losses are in nats and have a graph.

    `edit_loss` is the mean over prompt and paraphrases of the target's mean loss per token, `locality_loss` the mean KL divergence from
    the unedited model where the neighbours' answers are predicted. `success`, `generalization` and `locality` are shares: of the prompt
    and of the paraphrases whose target tokens are all predicted (the earlier ones given), and of the neighbours whose predictions are
    those of the unedited model (None: there are none).
    """

    edit_loss: Tensor
    locality_loss: Tensor
    success: float
    generalization: float | None
    locality: float | None


class Lesson:
    """One row, ready to be edited and asked. The model must be in its unedited state when it is made."""

    def __init__(self, lm: LanguageModel, request: EditRequest, *, first: int) -> None:
        """Encode a row and bring it to layer `first`.

        Raises:
            EditError: prompt and target cannot be encoded, or are too long.
        """
        limit = min(MOST_TOKENS, lm.description.max_positions)
        self._lm = lm
        located = locate(
            lm.tokenizer, request.prompt, request.subject, target=request.target_new, max_tokens=limit, request_id=request.request_id
        )
        self._edit = scored_row(located, scored_at="target", request_id=request.request_id)
        self._paraphrases = _rows(lm.tokenizer, [(text, request.target_new) for text in request.paraphrase_prompts], limit)
        self._neighbours = _rows(lm.tokenizer, [(probe.prompt, probe.answer) for probe in request.neighborhood_prompts], limit)
        asked = (self._edit, *self._paraphrases, *self._neighbours)
        self._edit_pass = UpperPass(lm, [self._edit.input_ids], first=first)
        self._asked_pass = UpperPass(lm, [row.input_ids for row in asked], first=first)
        self._rows_N, self._positions_N, self._tokens_N = (
            torch.tensor([value for row in parts for value in row])
            for parts in (
                [[number] * len(row.tokens) for number, row in enumerate(asked)],
                [row.positions for row in asked],
                [row.tokens for row in asked],
            )
        )
        with torch.no_grad():
            self._base_ND = self._hidden()[self._num_target_tokens :]

    def features(self, sites: Sequence[str]) -> EditingFeatures:
        """Return what the edited maps get and what the loss of prompt and target wants of them, on the unedited model."""
        return editing_features(self._lm, [self._edit], sites, upper=self._edit_pass)

    def outcome(self, updates: Mapping[str, Factors]) -> Outcome:
        """Ask under updates of the maps, by path."""
        with acting(self._lm.module, updates):
            hidden_ND = self._hidden()
        count = self._num_target_tokens
        log_probs_NV = next_token_logits(self._lm, hidden_ND[:count]).log_softmax(dim=-1)
        tokens_N = self._tokens_N[:count].to(log_probs_NV.device)
        losses_N = -log_probs_NV.gather(1, tokens_N[:, None])[:, 0]
        by_row = [losses_N[(self._rows_N[:count] == number).to(losses_N.device)].mean() for number in range(1 + len(self._paraphrases))]
        right = self._all_of_row(log_probs_NV.argmax(dim=-1) == tokens_N, range(1 + len(self._paraphrases)), start=0)
        divergence, same = self._kept(hidden_ND[count:])
        return Outcome(
            edit_loss=torch.stack(by_row).mean(),
            locality_loss=divergence,
            success=float(right[0]),
            generalization=sum(right[1:]) / len(right[1:]) if len(right) > 1 else None,
            locality=sum(same) / len(same) if same else None,
        )

    @cached_property
    def _num_target_tokens(self) -> int:
        return sum(len(row.tokens) for row in (self._edit, *self._paraphrases))

    def _hidden(self) -> Tensor:
        """Return the last layer's output where a token is predicted (N, D)."""
        hidden_BTD = self._asked_pass.hidden()
        return hidden_BTD[self._rows_N.to(hidden_BTD.device), self._positions_N.to(hidden_BTD.device)]

    def _kept(self, hidden_ND: Tensor) -> tuple[Tensor, list[bool]]:
        if not self._neighbours:
            return hidden_ND.new_zeros(()), []
        with torch.no_grad():
            base_NV = next_token_logits(self._lm, self._base_ND).log_softmax(dim=-1)
        edited_NV = next_token_logits(self._lm, hidden_ND).log_softmax(dim=-1)
        divergence = (base_NV.exp() * (base_NV - edited_NV)).sum(dim=-1).mean()
        first = 1 + len(self._paraphrases)
        numbers = range(first, first + len(self._neighbours))
        return divergence, self._all_of_row(base_NV.argmax(dim=-1) == edited_NV.argmax(dim=-1), numbers, start=self._num_target_tokens)

    def _all_of_row(self, right_N: Tensor, numbers: range, *, start: int) -> list[bool]:
        rows_N = self._rows_N[start : start + len(right_N)]
        return [bool(right_N.cpu()[rows_N == number].all()) for number in numbers]


def acting(module: nn.Module, updates: Mapping[str, Factors]) -> AbstractContextManager[None]:
    """Within the context the maps act as if their updates had been written into them; no whole matrix is made of the factors."""
    return updated(module, {path: (update,) for path, update in updates.items()})


def _rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]], limit: int) -> tuple[TargetRow, ...]:
    """Encode prompts with their answers; what cannot be encoded or is too long is left out, it only asks."""
    rows = []
    for prompt, answer in texts[:MOST_PROMPTS]:
        try:
            located = locate(tokenizer, BARE, prompt, target=answer, max_tokens=limit)
        except EditError:
            continue
        rows.append(scored_row(located, scored_at="target"))
    return tuple(rows)


def readable(lm: LanguageModel, requests: Sequence[EditRequest]) -> tuple[EditRequest, ...]:
    """Return the rows whose prompt and target can be encoded.

    Raises:
        DatasetError: none can, or no row asks about a neighbour.
    """
    limit = min(MOST_TOKENS, lm.description.max_positions)
    kept = []
    for request in requests:
        try:
            locate(lm.tokenizer, request.prompt, request.subject, target=request.target_new, max_tokens=limit)
        except EditError:
            continue
        kept.append(request)
    if not any(request.neighborhood_prompts for request in kept):
        raise DatasetError(
            f"{len(kept)} of {len(requests)} training rows can be encoded in {limit} tokens and none of them asks about a neighbour, so "
            "nothing would teach the method what to leave alone; choose another training set"
        )
    return tuple(kept)
