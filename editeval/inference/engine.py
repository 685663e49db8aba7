"""How a module is asked as it stands: texts to tokens, tokens to passes, passes within the device's memory.

Who answers a request, and which answers are still the unedited model's, is decided in `edited.py`. What comes again is neither tokenised
nor packed again.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from editeval.inference.adapters import PassAdapter, WithoutAnswer
from editeval.inference.encoding import EncodePairs, TokenPair, encode_texts, fit, prefix_token, windows
from editeval.inference.endings import EarlyStops, GenerationLimits
from editeval.inference.generation import generate_greedy
from editeval.inference.plan import ScoringPlan, plan_for
from editeval.inference.recall import Remembered
from editeval.inference.scoring import ContinuationScore, PackedPairs, pack_pairs, score_packed
from editeval.models.model import LanguageModel

_LOGGER = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Engine:
    """Passes through one model; `unedited` shows it as it was before any edit, for the trial that decides how it is run."""

    def __init__(self, lm: LanguageModel, *, batch_tokens: int, unedited: Callable[[], AbstractContextManager[None]]) -> None:
        self._lm = lm
        self._batch_tokens = batch_tokens
        self._unedited = unedited
        self._plan: ScoringPlan | None = None
        self._packed: Remembered[PackedPairs] = Remembered(lambda packed: packed.nbytes)
        self._encoded: Remembered[list[array[int]]] = Remembered(lambda texts: sum(4 * len(ids) + 64 for ids in texts))

    @property
    def batch_tokens(self) -> int:
        """The most tokens of one pass; fewer than was asked for once the device's memory was too small."""
        return self._batch_tokens if self._plan is None else self._plan.batch_tokens

    def score(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        special_tokens: bool | None,
        adapter: PassAdapter | None,
        encode: EncodePairs,
    ) -> list[ContinuationScore]:
        """Score continuations[i] after contexts[i], encoded (and split) by `encode`."""
        max_length = self._lm.description.max_positions

        def pairs() -> list[TokenPair]:
            encoded = encode(self._lm.tokenizer, contexts, continuations, special_tokens=special_tokens)
            return [fit(pair, max_length=max_length) for pair in encoded]

        return self._score_pairs((encode, tuple(contexts), tuple(continuations), special_tokens), pairs, adapter)

    def score_text(
        self, texts: Sequence[str], prefixes: Sequence[str], special_tokens: bool | None, adapter: PassAdapter | None
    ) -> list[ContinuationScore]:
        """Score texts behind prefixes (mostly none)."""
        max_length = self._lm.description.max_positions
        bare = (prefix_token(self._lm.tokenizer),)
        pairs_of_text = [
            windows(text_ids, prefix=tuple(prefix_ids[-(max_length // 2) :]) or bare, max_length=max_length)
            for text_ids, prefix_ids in zip(self._tokens(texts, special_tokens), self._tokens(prefixes, special_tokens), strict=True)
        ]
        every_pair = [pair for pairs in pairs_of_text for pair in pairs]
        acting = WithoutAnswer(adapter) if adapter is not None and adapter.acts_in_texts else None
        scores = iter(self._score_pairs(("text", tuple(texts), tuple(prefixes), special_tokens), lambda: every_pair, acting))
        return [_joined([next(scores) for _ in pairs]) for pairs in pairs_of_text]

    def _score_pairs(
        self, requests: Hashable, pairs: Callable[[], Sequence[TokenPair]], adapter: PassAdapter | None
    ) -> list[ContinuationScore]:
        """Score the pairs of these requests, packed as they were before if they come again."""

        def answer(plan: ScoringPlan) -> list[ContinuationScore]:
            key = (requests, plan, None if adapter is None else (adapter.sharing,))
            packed = self._packed.get(key) or self._packed.put(key, pack_pairs(pairs(), plan, adapter=adapter))
            return score_packed(self._lm.module, packed, adapter=adapter)

        return self._within_memory(answer)

    def generate(
        self,
        contexts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str],
        special_tokens: bool | None,
        adapter: PassAdapter | None,
        early: EarlyStops,
    ) -> list[str]:
        """Continue each context greedily (see `EditedModel.generate`)."""
        most = self._lm.description.max_positions
        limits = GenerationLimits(max_new_tokens=max_new_tokens, stop=tuple(stop), max_length=most, early=early)
        filled = [tuple(ids) or (prefix_token(self._lm.tokenizer),) for ids in self._tokens(contexts, special_tokens)]
        return self._within_memory(lambda plan: generate_greedy(self._lm.module, self._lm.tokenizer, filled, limits, plan, adapter=adapter))

    def _tokens(self, texts: Sequence[str], special_tokens: bool | None) -> list[array[int]]:
        """Return the token ids of each text."""
        key = (tuple(texts), special_tokens)
        known = self._encoded.get(key)
        if known is None:
            encoded = encode_texts(self._lm.tokenizer, texts, special_tokens=special_tokens)
            known = self._encoded.put(key, [array("i", ids) for ids in encoded])
        return known

    def _within_memory(self, call: Callable[[ScoringPlan], list[Answer]]) -> list[Answer]:
        """Answer by the model's plan; where the device's memory is too small for it, by one with half the tokens, from then on."""
        while True:
            plan = self.plan()
            try:
                with self._lm.packed_products():
                    return call(plan)
            except torch.OutOfMemoryError:
                smaller = plan.halved()
                if smaller is None:
                    raise
            # Outside of the handler, whose traceback holds on to what is to be freed.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _LOGGER.warning("out of memory with %d tokens in a pass; going on with %d", plan.batch_tokens, smaller.batch_tokens)
            self._plan = smaller

    def plan(self) -> ScoringPlan:
        """Return how this model is run; decided once, on the base model, so that it is the same along a trajectory."""
        if self._plan is None:
            with self._unedited():
                self._plan = plan_for(self._lm.module, batch_tokens=self._batch_tokens, max_length=self._lm.description.max_positions)
        return self._plan


def _joined(scores: Sequence[ContinuationScore]) -> ContinuationScore:
    return ContinuationScore(
        log_prob=sum(score.log_prob for score in scores),
        token_log_probs=tuple(value for score in scores for value in score.token_log_probs),
        token_is_greedy=tuple(value for score in scores for value in score.token_is_greedy),
    )
