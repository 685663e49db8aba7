"""A scope classifier: is a request about an edited fact (SERAC, arXiv:2206.06520, section 3.2, the form that compares embeddings)?

    g(x, fact) = sigmoid(scale * (cos(e(x), e(fact's prompt)) - threshold))

The encoder e, scale and threshold are trained on the binary cross-entropy of requests that are about a fact (its prompt and paraphrases)
and of those that are not: a fact's neighbours, and the requests of other facts. Of all the facts that a request is not about only the
likeliest counts, as in use, where the likeliest fact decides; half of a step's rows are the nearest to the other half, so that it is a hard
one. In use one matrix product compares a request with all facts, and `similarity` is the cosine at which g is one half.

Shapes: Q requests, F facts, D the encoder's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editeval.memory.encoder import SentenceEncoder
from editeval.memory.facts import last_sentence
from editeval.memory.training import Learner, Validation
from editeval.types import EditRequest

FIRST_SCALE = 20.0  # a cosine of 0.1 from the threshold is then a probability of 0.88
MOST_SIMILARITY = 0.95  # a fact's own prompt, whose cosine is 1, is always about it
MOST_PARAPHRASES = 2
ROWS_AT_ONCE = 1024  # that are compared with all others


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Requests, and for each the prompts of the facts that it is about."""

    texts: list[str]
    about: list[str | None]


class ScopeLearner(Learner):
    """The classifier in training; `rows` are those to learn from, without any that is held back."""

    def __init__(self, encoder: SentenceEncoder, rows: Sequence[EditRequest], *, threshold: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))
        self._nearest = _nearest_rows(encoder, rows)
        encoder.requires_grad_(True)

    @property
    def similarity(self) -> float:
        """The cosine from which on a request is about a fact."""
        return min(float(self.threshold.detach()), MOST_SIMILARITY)

    def loss(self, rows: Sequence[EditRequest]) -> Tensor:
        """Return the cross-entropy over these rows and the row nearest to each."""
        facts = list({row.full_prompt: row for each in rows for row in (each, self._nearest[each.full_prompt])}.values())
        return self._cross_entropy(*self._compared(facts))

    @torch.no_grad()
    def validate(self, rows: Sequence[EditRequest], step: int) -> Validation:
        """Return loss, and precision and recall of the decision over rows that are all edited."""
        self.encoder.forget()
        logits_QF, is_about_QF = self._compared(rows)
        likeliest = logits_QF.max(dim=1)
        fired_Q = likeliest.values > 0
        right_Q = fired_Q & is_about_QF.gather(1, likeliest.indices[:, None])[:, 0]
        asked = int(is_about_QF.any(dim=1).sum())
        shares = {
            "precision": float(right_Q.sum()) / max(1, int(fired_Q.sum())),
            "recall": float(right_Q.sum()) / max(1, asked),
            "threshold": self.similarity,
        }
        return Validation(step=step, loss=float(self._cross_entropy(logits_QF, is_about_QF)), shares=shares)

    def _compared(self, facts: Sequence[EditRequest]) -> tuple[Tensor, Tensor]:
        """Return logits (Q, F) of every request of these rows against every fact of them, and which are right."""
        asked = _asked(facts)
        prompts = [row.full_prompt for row in facts]
        cosines_QF = self.encoder(asked.texts) @ self.encoder(prompts).T
        logits_QF = self.log_scale.exp() * (cosines_QF - self.threshold)
        about = torch.tensor([[target == prompt for prompt in prompts] for target in asked.about], device=logits_QF.device)
        return logits_QF, about

    def _cross_entropy(self, logits_QF: Tensor, is_about_QF: Tensor) -> Tensor:
        about_log_probs = nn.functional.logsigmoid(logits_QF)[is_about_QF]
        others_Q = logits_QF.masked_fill(is_about_QF, float("-inf")).max(dim=1).values
        not_about_log_probs = nn.functional.logsigmoid(-others_Q[torch.isfinite(others_Q)])
        return -(about_log_probs.mean() + not_about_log_probs.mean())


def _asked(rows: Sequence[EditRequest]) -> _Asked:
    """Return the requests of rows; a neighbour's prompt that is itself the prompt of a fact is about that one."""
    prompts = {row.full_prompt for row in rows}
    texts: list[str] = []
    about: list[str | None] = []
    for row in rows:
        inside = [row.full_prompt, *row.paraphrase_prompts[:MOST_PARAPHRASES]]
        outside = [probe.prompt for probe in row.neighborhood_prompts[:MOST_PARAPHRASES]]
        texts += [last_sentence(text) for text in (*inside, *outside)]
        about += [row.full_prompt] * len(inside) + [text if text in prompts else None for text in outside]
    return _Asked(texts=texts, about=about)


def _nearest_rows(encoder: SentenceEncoder, rows: Sequence[EditRequest]) -> Mapping[str, EditRequest]:
    """Return by each row's prompt the other row whose prompt is nearest to it before training."""
    distinct = list({row.full_prompt: row for row in rows}.values())
    embedded = encoder.encode([row.full_prompt for row in distinct])
    nearest: dict[str, EditRequest] = {}
    for start in range(0, len(distinct), ROWS_AT_ONCE):
        cosines = embedded[start : start + ROWS_AT_ONCE] @ embedded.T
        cosines.diagonal(start).fill_(-2.0)
        found = cosines.argmax(dim=1).tolist()
        nearest |= {row.full_prompt: distinct[number] for row, number in zip(distinct[start:], found, strict=False)}
    return nearest
