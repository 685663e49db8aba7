"""Cheap signs of a broken model, to be read after an edit: how large its weights are, and how surprising plain sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from editeval.inference.edited import EditedModel

CANARY_TEXTS = (
    ("The sun rises in the east", " and sets in the west, and the days grow longer in spring."),
    ("After lunch the children went outside", " to play in the garden until it was time to go home."),
    ("Water boils when it is heated", " and freezes when it becomes cold enough, as everyone knows."),
)
MOST_LOG = 700.0  # of a number that a float can hold


def weight_norm_ratio(model: EditedModel) -> float:
    """Return the largest ||W|| / ||W_base|| (Frobenius) over the edited parameters; 1 before any edit, NaN for broken weights."""
    ratios = [float(model.weight(name).norm() / model.base_weight(name).norm()) for name in model.edited_parameters]
    return math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios, default=1.0)


def canary_log_perplexity(model: EditedModel) -> float:
    """Return the mean negative log-probability of a token of the canary sentences (nats)."""
    scores = model.score([context for context, _ in CANARY_TEXTS], [continuation for _, continuation in CANARY_TEXTS])
    return -sum(score.log_prob for score in scores) / sum(score.num_tokens for score in scores)


@dataclass
class Canary:
    """The perplexity of the canary sentences over the unedited model's, which is asked once."""

    _base: float | None = None

    def ratio(self, model: EditedModel) -> float:
        """Return the ratio, infinite where no float holds it; NaN where a perplexity is no number."""
        if self._base is None:
            with model.unedited():
                self._base = canary_log_perplexity(model)
        log_ratio = canary_log_perplexity(model) - self._base
        return math.inf if log_ratio > MOST_LOG else math.exp(log_ratio)
