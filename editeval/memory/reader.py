"""A counterfactual model: a small language model that answers a request by the fact before it (SERAC, arXiv:2206.06520, section 3.2).

It is trained on the loss of the fact's answer behind the fact and its prompt, and behind the fact and each paraphrase.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from editeval.inference.encoding import TokenPair, encode_pairs
from editeval.memory.demonstrations import question, statement_of
from editeval.memory.training import Learner, Validation
from editeval.models.model import LanguageModel
from editeval.types import EditevalError, EditRequest

MOST_PARAPHRASES = 1
MOST_TOKENS = 192  # a text; longer rows are left out


class ReaderLearner(Learner):
    """The model in training; a row that cannot be encoded, or is too long, counts nothing."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.module = lm.module
        self._lm = lm
        self._limit = min(MOST_TOKENS, lm.description.max_positions)
        self.module.requires_grad_(True)

    def loss(self, rows: Sequence[EditRequest]) -> Tensor:
        """Return the answers' mean loss a token."""
        losses, _ = self._answers(rows)
        return losses.mean() if len(losses) else sum(parameter.sum() * 0 for parameter in self.module.parameters())  # type: ignore[return-value]

    @torch.no_grad()
    def validate(self, rows: Sequence[EditRequest], step: int) -> Validation:
        """Return the loss, and the share of answers whose every token is predicted, the earlier ones given."""
        parts = [self._answers([row]) for row in rows]
        losses = torch.cat([losses for losses, _ in parts])
        right = torch.cat([right for _, right in parts]).float()
        return Validation(step=step, loss=float(losses.mean()), shares={"answers": float(right.mean())})

    def _answers(self, rows: Sequence[EditRequest]) -> tuple[Tensor, Tensor]:
        """Return each answer's mean loss a token, and whether all of it is predicted."""
        device = next(self.module.parameters()).device
        pairs = [pair for row in rows for pair in self._pairs(row)]
        if not pairs:
            return torch.empty(0, device=device), torch.empty(0, dtype=torch.bool, device=device)
        width = max(len(pair.context) + len(pair.continuation) for pair in pairs)
        # Padding stands on the right, where causal attention never looks; any token will do.
        ids = [[*pair.context, *pair.continuation] for pair in pairs]
        padded = torch.tensor([row + row[-1:] * (width - len(row)) for row in ids], device=device)
        logits_BTV = self.module(input_ids=padded, use_cache=False).logits
        losses, right = [], []
        for number, pair in enumerate(pairs):
            start, end = len(pair.context), len(pair.context) + len(pair.continuation)
            targets = padded[number, start:end]
            predicted = logits_BTV[number, start - 1 : end - 1].float()
            losses.append(nn.functional.cross_entropy(predicted, targets))
            right.append((predicted.argmax(dim=-1) == targets).all())
        return torch.stack(losses), torch.stack(right)

    def _pairs(self, row: EditRequest) -> list[TokenPair]:
        prefix, prompts = question(statement_of(row)), (row.full_prompt, *row.paraphrase_prompts[:MOST_PARAPHRASES])
        try:
            pairs = encode_pairs(
                self._lm.tokenizer,
                [prefix + prompt.rstrip() for prompt in prompts],
                [f" {row.target_new}"] * len(prompts),
                special_tokens=None,
            )
        except EditevalError:
            return []
        return [pair for pair in pairs if len(pair.context) + len(pair.continuation) <= self._limit]
