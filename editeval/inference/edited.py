"""A model under edits: the one engine that every number comes from.

`EditedModel` applies recorded edits, takes them back exactly, and answers: `score`, `score_text`, `generate`. All three take text, so
that what is added later (shared prefixes, adapters that route a request or rewrite its context) changes no caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from editeval.edits.delta import Edit
from editeval.inference.encoding import encode_pairs, encode_texts, fit, prefix_token, windows
from editeval.inference.generation import GenerationLimits, generate_greedy
from editeval.inference.scoring import ContinuationScore, ScoringPlan, plan_for, score_pairs
from editeval.inference.weights import EditedWeights
from editeval.models.model import LanguageModel
from editeval.types import EditevalError

__all__ = ["ContinuationScore", "EditedModel"]


class EditedModel:
    """Hugging Face model + tokenizer + sites, the edits applied so far, and an exact way back.

    Base weights are kept copy-on-first-write on the CPU; edited matrices keep a float32 master so that small updates do
    not vanish in half precision (for float32 models the parameter itself is the master).

    `batch_tokens` bounds the tokens of one pass through the model, padding counted. Scores do not depend on it in float32.
    """

    lm: LanguageModel
    auxiliary: list[Mapping[str, Tensor]]  # of every applied edit, in order

    def __init__(self, lm: LanguageModel, *, batch_tokens: int = 4096) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; at least 1")
        self.lm = lm
        self.auxiliary = []
        self._batch_tokens = batch_tokens
        self._weights = EditedWeights(lm)
        self._plan: ScoringPlan | None = None

    @property
    def num_applied(self) -> int:
        """Number of edits applied since the last restore."""
        return len(self.auxiliary)

    @property
    def edited_parameters(self) -> tuple[str, ...]:
        """Names of the parameters edited since the last restore, sorted."""
        return self._weights.edited

    def apply(self, edit: Edit) -> None:
        """Apply a recorded edit: the only thing that changes the model. Bit-for-bit the same live and replayed.

        An edit without any delta is allowed (a method may only remember, and the control edits nothing); one whose deltas change
        nothing is an error.

        Raises:
            EditError: a parameter is unknown, a shape is wrong, a number is not finite, or the deltas change nothing; nothing is changed.
            EditevalError: within `unedited()`.
        """
        self._weights.add(edit.deltas)
        self.auxiliary.append(edit.auxiliary)

    def check(self, edit: Edit) -> None:
        """Raise the EditError that `apply` would raise, and change nothing: an edit is checked before it is recorded."""
        self._weights.check(edit.deltas)

    def restore(self) -> None:
        """Put the base weights back, bit for bit, and forget every edit."""
        self._weights.restore()
        self.auxiliary.clear()

    def weights_digest(self) -> str:
        """Return the sha256 over every edited parameter (name, bytes; its master's too); of the empty string before any edit.

        Within `unedited()` it is that of the base model: of the empty string.
        """
        return self._weights.digest()

    def weight(self, parameter: str) -> Tensor:
        """Return the current weight as float32 (d_out, d_in), on its own device (a view or a copy: do not write)."""
        return self._weights.current(parameter)

    def base_weight(self, parameter: str) -> Tensor:
        """Return the unedited weight as float32 (d_out, d_in), on the parameter's device (a view or a copy: do not write)."""
        return self._weights.base(parameter)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within the context the model is the base model; afterwards exactly what it was. No edit can be applied within."""
        with self._weights.unedited():
            yield

    def score(
        self, contexts: Sequence[str], continuations: Sequence[str], *, special_tokens: bool | None = None
    ) -> list[ContinuationScore]:
        """Score continuations[i] after contexts[i]; equal beginnings are computed once.

        White space at a context's end counts to the continuation; an empty context is one beginning-of-sequence token; a context that
        is too long loses tokens on the left. `special_tokens` says whether the tokenizer adds its own (None: its default).

        Raises:
            EditevalError: a continuation has no token of its own, or does not fit the model.
            ValueError: unequal numbers of contexts and continuations.
        """
        self._check_mode()
        max_length = self.lm.description.max_positions
        pairs = encode_pairs(self.lm.tokenizer, contexts, continuations, special_tokens=special_tokens)
        return score_pairs(self.lm.module, [fit(pair, max_length=max_length) for pair in pairs], self._scoring_plan())

    def score_text(self, texts: Sequence[str], *, special_tokens: bool | None = None) -> list[ContinuationScore]:
        """Score every token of each text, in windows of the model's length (a text without tokens has log-probability 0).

        The first token follows a prefix token; each later window sees the token before it; the last is filled up with context. As in
        lm-eval, a beginning-of-sequence token that the tokenizer adds is scored too; `special_tokens=False` leaves it out.
        """
        self._check_mode()
        prefix, max_length = prefix_token(self.lm.tokenizer), self.lm.description.max_positions
        tokens = encode_texts(self.lm.tokenizer, texts, special_tokens=special_tokens)
        pairs_of_text = [windows(ids, prefix=prefix, max_length=max_length) for ids in tokens]
        scores = iter(score_pairs(self.lm.module, [pair for pairs in pairs_of_text for pair in pairs], self._scoring_plan()))
        return [_joined([next(scores) for _ in pairs]) for pairs in pairs_of_text]

    def generate(
        self, contexts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = (), special_tokens: bool | None = None
    ) -> list[str]:
        """Continue each context greedily until end of sequence, a stop string (cut off) or `max_new_tokens`.

        Returns the new text without special tokens. A context that is too long loses tokens on the left, so that `max_new_tokens` fit.

        Raises:
            EditevalError: `max_new_tokens` leaves no room for a context.
            ValueError: `max_new_tokens` below 1, or `stop` is one string.
        """
        self._check_mode()
        if max_new_tokens < 1 or isinstance(stop, str):
            raise ValueError(f"max_new_tokens is {max_new_tokens} (at least 1), stop is {stop!r} (a list of strings)")
        tokens = encode_texts(self.lm.tokenizer, contexts, special_tokens=special_tokens)
        limits = GenerationLimits(
            max_new_tokens=max_new_tokens, stop=tuple(stop), max_length=self.lm.description.max_positions, batch_tokens=self._batch_tokens
        )
        filled = [ids or (prefix_token(self.lm.tokenizer),) for ids in tokens]
        return generate_greedy(self.lm.module, self.lm.tokenizer, filled, limits)

    def _scoring_plan(self) -> ScoringPlan:
        """Return how this model is run; decided once, on the base model, so that it is the same along a trajectory."""
        if self._plan is None:
            with self.unedited():
                self._plan = plan_for(self.lm.module, batch_tokens=self._batch_tokens, max_length=self.lm.description.max_positions)
        return self._plan

    def _check_mode(self) -> None:
        if any(module.training for module in self.lm.module.modules()):
            raise EditevalError("the model is in training mode, where dropout makes every answer random; call module.eval() first")


def _joined(scores: Sequence[ContinuationScore]) -> ContinuationScore:
    return ContinuationScore(
        log_prob=sum(score.log_prob for score in scores),
        token_log_probs=tuple(value for score in scores for value in score.token_log_probs),
        token_is_greedy=tuple(value for score in scores for value in score.token_is_greedy),
    )
