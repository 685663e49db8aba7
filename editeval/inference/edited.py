"""A model under edits: the one engine that every number comes from.

`EditedModel` applies recorded edits, takes them back exactly, and answers: `score`, `score_answers`, `score_text`, `generate`. All take
text, so that shared prefixes, and adapters that route a request or rewrite its context, change no caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from editeval.edits.delta import AdapterDelta, Delta, Edit, WeightDelta
from editeval.inference.adapters import ActivationAdapter, Adapter, ObservableAdapter, PassAdapter, RequestAdapter, Route
from editeval.inference.encoding import EncodePairs, encode_answers, encode_pairs, fitting_prefix
from editeval.inference.endings import NO_EARLY_STOPS, EarlyStops
from editeval.inference.engine import Engine
from editeval.inference.recall import BaseAnswers, Recorder, Remembered
from editeval.inference.scoring import ContinuationScore
from editeval.inference.weights import EditedWeights
from editeval.models.model import LanguageModel
from editeval.types import EditError, EditevalError

__all__ = ["ContinuationScore", "EditedModel"]

Answer = TypeVar("Answer")
ANSWER_TOKENS = 64  # room behind a routed context; the same whatever continuation is scored, so that choices are compared after one context


class Ask(Protocol[Answer]):
    """How a model is asked for some of a call's requests (by number), each behind its prefix, with an adapter where prompts end."""

    def __call__(self, model: EditedModel, numbers: Sequence[int], prefixes: Sequence[str], adapter: PassAdapter | None) -> list[Answer]:
        """Return the answers in order."""
        ...


class EditedModel:
    """Hugging Face model + tokenizer + sites, the edits applied so far, and an exact way back.

    Base weights are kept copy-on-first-write on the CPU; edited matrices keep a float32 master so that small updates do
    not vanish in half precision (for float32 models the parameter itself is the master). Edits that are no weight updates go to the
    adapter of their method, which must be attached first.

    `batch_tokens` bounds the tokens of one pass through the model, padding counted. Scores do not depend on it in float32.

    Requests that come again are not tokenised and packed again; nor, where edits stand beside the weights, computed again if no edit
    reaches them (those that are routed apart: one by one; those that meet an adapter within a pass: call by call).
    """

    lm: LanguageModel
    auxiliary: list[Mapping[str, Tensor]]  # of every applied edit, in order

    def __init__(self, lm: LanguageModel, *, batch_tokens: int = 4096) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; at least 1")
        self.lm = lm
        self.auxiliary = []
        self._engine = Engine(lm, batch_tokens=batch_tokens, unedited=self.unedited)
        self._weights = EditedWeights(lm)
        self._adapter: Adapter | None = None
        self._hidden = False
        self._base_answers: Remembered[BaseAnswers] = Remembered(lambda base: base.nbytes)

    @property
    def num_applied(self) -> int:
        """Number of edits applied since the last restore."""
        return len(self.auxiliary)

    @property
    def is_unedited(self) -> bool:
        """Whether nothing was changed since the last restore: no weight, and nothing that an adapter holds."""
        return not self._weights.edited and (self._adapter is None or self._adapter.is_empty)

    @property
    def edited_parameters(self) -> tuple[str, ...]:
        """Names of the parameters edited since the last restore, sorted."""
        return self._weights.edited

    @property
    def sharing(self) -> Hashable:
        """What decides, beside the requests, which of them share a pass and how: None without an adapter that stands in the model."""
        return self._adapter.sharing if isinstance(self._adapter, ActivationAdapter) else None

    @property
    def rounding(self) -> tuple[int, str] | None:
        """What rounding depends on beside the requests: tokens of a pass and kind of device; None in float32, where it is no matter."""
        if self.lm.module.dtype == torch.float32:
            return None
        return self._engine.batch_tokens, self.lm.input_device.type

    @property
    def adapter(self) -> Adapter | None:
        """What takes the edits that are no weight updates, if anything."""
        return self._adapter

    def attach(self, adapter: Adapter) -> None:
        """Give the model what its edits need beside weights.

        Raises:
            EditevalError: there is one already, or edits were applied without it.
        """
        if self._adapter is not None or self.num_applied:
            found = f"{self.num_applied} edits are applied" if self._adapter is None else f"a {type(self._adapter).__name__} is attached"
            raise EditevalError(f"{found}; attach an adapter once, to an unedited model")
        self._adapter = adapter

    def apply(self, edit: Edit) -> None:
        """Apply a recorded edit: the only thing that changes the model. Bit-for-bit the same live and replayed.

        An edit without any delta is allowed (a method may only remember, and the control edits nothing); one whose deltas change
        nothing is an error.

        Raises:
            EditError: a parameter is unknown, a shape is wrong, a number is not finite, the deltas change nothing, or no adapter takes
                them; nothing is changed.
            EditevalError: within `unedited()`.
        """
        weights, others = self._divided(edit.deltas)
        if self._adapter is not None and others:
            self._adapter.check(others)
        self._weights.add(weights)
        if self._adapter is not None and others:
            self._adapter.add(others)
        self.auxiliary.append(edit.auxiliary)

    def check(self, edit: Edit) -> None:
        """Raise the EditError that `apply` would raise, and change nothing: an edit is checked before it is recorded."""
        weights, others = self._divided(edit.deltas)
        self._weights.check(weights)
        if self._adapter is not None and others:
            self._adapter.check(others)

    def restore(self) -> None:
        """Put the base weights back, bit for bit, and forget every edit; an attached adapter stays, empty."""
        self._weights.restore()
        if self._adapter is not None:
            self._adapter.clear()
        self.auxiliary.clear()

    def weights_digest(self) -> str:
        """Return the sha256 over every edited parameter (name, bytes; its master's too) and the adapter's entries.

        It is that of the empty string before any edit. Within `unedited()` it is that of the base model.
        """
        weights = self._weights.digest()
        adapter = self._acting
        return weights if adapter is None else hashlib.sha256(f"{weights}\0{adapter.digest()}".encode()).hexdigest()

    def weight(self, parameter: str) -> Tensor:
        """Return the current weight as float32 (d_out, d_in), on its own device (a view or a copy: do not write)."""
        return self._weights.current(parameter)

    def base_weight(self, parameter: str) -> Tensor:
        """Return the unedited weight as float32 (d_out, d_in), on the parameter's device (a view or a copy: do not write)."""
        return self._weights.base(parameter)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within the context the model is the base model; afterwards exactly what it was. No edit can be applied within."""
        hidden_before = self._hidden
        self._hidden = True
        try:
            with self._weights.unedited():
                yield
        finally:
            self._hidden = hidden_before

    def holding(self, matrices: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within the context these weights (d_out, d_in), float32, are the model's; afterwards they are exactly what they were.

        Raises:
            EditError: a parameter is unknown.
        """
        return self._weights.holding(matrices)

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
        return self._scores(contexts, continuations, special_tokens, encode_pairs)

    def score_answers(
        self, prompts: Sequence[str], answers: Sequence[str], *, special_tokens: bool | None = None
    ) -> list[ContinuationScore]:
        """Score answers[i] after prompts[i] as they are: what is scored is what `generate` would have to write.

        This is `score` but for prompts that end in white space, as chat templates do: it counts to the prompt. See `answer_after` for
        the blank between prompt and answer.

        Raises:
            EditevalError: an answer has no token of its own, or does not fit the model.
            ValueError: unequal numbers of prompts and answers.
        """
        return self._scores(prompts, answers, special_tokens, encode_answers)

    def _scores(
        self, contexts: Sequence[str], continuations: Sequence[str], special_tokens: bool | None, encode: EncodePairs
    ) -> list[ContinuationScore]:
        self._check_mode()
        if len(contexts) != len(continuations):
            raise ValueError(f"{len(contexts)} contexts and {len(continuations)} continuations; one continuation a context")

        def ask(
            model: EditedModel, numbers: Sequence[int], prefixes: Sequence[str], adapter: PassAdapter | None
        ) -> list[ContinuationScore]:
            asked = [prefix + contexts[number] for number, prefix in zip(numbers, prefixes, strict=True)]
            return model._engine.score(asked, [continuations[number] for number in numbers], special_tokens, adapter, encode)

        call = (encode, tuple(contexts), tuple(continuations), special_tokens)
        return self._answers(call, contexts, ask, behind=ANSWER_TOKENS)

    def score_text(self, texts: Sequence[str], *, special_tokens: bool | None = None) -> list[ContinuationScore]:
        """Score every token of each text, in windows of the model's length (a text without tokens has log-probability 0).

        The first token follows a prefix token; each later window sees the token before it; the last is filled up with context. As in
        lm-eval, a beginning-of-sequence token that the tokenizer adds is scored too; `special_tokens=False` leaves it out.

        A text has no prompt that ends. What is looked up at a prompt's end leaves it as it is; what is routed by all of a prompt's tokens
        is routed by those of each window (see `PassAdapter.acts_in_texts`).
        """
        self._check_mode()

        def ask(
            model: EditedModel, numbers: Sequence[int], prefixes: Sequence[str], adapter: PassAdapter | None
        ) -> list[ContinuationScore]:
            return model._engine.score_text([texts[number] for number in numbers], prefixes, special_tokens, adapter)

        return self._answers(("text", tuple(texts), special_tokens), texts, ask, behind=None)

    def generate(
        self,
        contexts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        special_tokens: bool | None = None,
        early: EarlyStops = NO_EARLY_STOPS,
    ) -> list[str]:
        """Continue each context greedily until end of sequence, a stop string (cut off), `max_new_tokens` or an early stop.

        Returns the new text without special tokens. A context that is too long loses tokens on the left, so that `max_new_tokens` fit.

        Raises:
            EditevalError: `max_new_tokens` leaves no room for a context.
            ValueError: `max_new_tokens` below 1, or `stop` is one string.
        """
        self._check_mode()
        if max_new_tokens < 1 or isinstance(stop, str):
            raise ValueError(f"max_new_tokens is {max_new_tokens} (at least 1), stop is {stop!r} (a list of strings)")

        def ask(model: EditedModel, numbers: Sequence[int], prefixes: Sequence[str], adapter: PassAdapter | None) -> list[str]:
            asked = [prefix + contexts[number] for number, prefix in zip(numbers, prefixes, strict=True)]
            return model._engine.generate(asked, max_new_tokens, stop, special_tokens, adapter, early)

        call = ("generate", tuple(contexts), max_new_tokens, tuple(stop), special_tokens, early)
        return self._answers(call, contexts, ask, behind=max_new_tokens)

    def _answers(self, call: Hashable, requests: Sequence[str], ask: Ask[Answer], *, behind: int | None) -> list[Answer]:
        """Return the answers to a call (which `call` names); what no edit reaches gets what the unedited model answered.

        It answers calls as a whole, so that an answer depends on nothing that was asked before, nor on which of its neighbours are reached.
        `behind` is how many tokens must fit behind a request; None: the request is a text in windows, half of the first is a prefix's.
        """

        def whole(adapter: PassAdapter | None) -> list[Answer]:
            return ask(self, range(len(requests)), [""] * len(requests), adapter)

        acting = self._acting
        as_unedited = self._adapter is not None and (self._hidden or not self._weights.edited)
        if isinstance(acting, RequestAdapter):
            others = (lambda: self._remembered(call, whole, None)) if as_unedited else (lambda: whole(None))
            return self._by_routes(acting.routes(requests), requests, ask, behind, others)
        recorder = None
        if isinstance(self._adapter, ObservableAdapter) and self._adapter.observable:
            recorder = Recorder(self._adapter, acts=acting is not None)
        if not as_unedited or (recorder is None and self._activation is not None):
            return whole(self._activation)
        return self._remembered(call, whole, recorder)

    def _remembered(self, call: Hashable, whole: Callable[[PassAdapter | None], list[Answer]], recorder: Recorder | None) -> list[Answer]:
        """Return what the unedited model answered to a call; the model's own answers where an adapter (the recorder's) reaches into it."""
        known = self._base_answers.get(call)
        if known is not None and not (recorder is not None and recorder.reached(known.seen)):
            return list(cast("tuple[Answer, ...]", known.answers))
        answers = whole(recorder)
        seen = torch.empty(0, 0) if recorder is None else recorder.seen
        if recorder is None or not recorder.reached(seen):
            self._base_answers.put(call, BaseAnswers(answers=tuple(answers), seen=seen))
        return answers

    def _by_routes(
        self,
        routes: Sequence[Route | None],
        requests: Sequence[str],
        ask: Ask[Answer],
        behind: int | None,
        others: Callable[[], list[Answer]],
    ) -> list[Answer]:
        """Ask each model for the requests that go to it, and return all answers in order; `others` answers as if there were no routes."""
        answers: dict[int, Answer] = {}
        groups: dict[int, tuple[EditedModel, list[int], list[str]]] = {}
        for number, route in enumerate(routes):
            model, prefix = self._answering(route, requests[number], behind)
            if model is self and not prefix:
                continue
            _, numbers, prefixes = groups.setdefault(id(model), (model, [], []))
            numbers.append(number)
            prefixes.append(prefix)
        for model, numbers, prefixes in groups.values():
            answers.update(zip(numbers, ask(model, numbers, prefixes, None), strict=True))
        if len(answers) < len(requests):
            answers = {**dict(enumerate(others())), **answers}
        return [answers[number] for number in range(len(requests))]

    def _answering(self, route: Route | None, request: str, behind: int | None) -> tuple[EditedModel, str]:
        """Return who answers a request, and what stands before it; where its route has no room, this model as it is."""
        if route is None:
            return self, ""
        model = route.model or self
        most = model.lm.description.max_positions
        room, text = (most // 2, "") if behind is None else (most - behind, request)
        prefix = fitting_prefix(model.lm.tokenizer, route.demonstrations, route.prefix, text, room=room)
        return (model, prefix) if prefix else (self, "")

    @property
    def _acting(self) -> Adapter | None:
        """The adapter, where it holds anything and is not hidden."""
        adapter = self._adapter
        return None if adapter is None or self._hidden or adapter.is_empty else adapter

    @property
    def _activation(self) -> ActivationAdapter | None:
        adapter = self._acting
        return adapter if isinstance(adapter, ActivationAdapter) else None

    def _divided(self, deltas: Sequence[Delta]) -> tuple[list[WeightDelta], list[AdapterDelta]]:
        """Return the deltas of weights, and the adapter's.

        Raises:
            EditError: there are deltas for an adapter, and none is attached.
        """
        weights = [delta for delta in deltas if isinstance(delta, WeightDelta)]
        others = [delta for delta in deltas if not isinstance(delta, WeightDelta)]
        if others and self._adapter is None:
            raise EditError(
                f"the edit holds a {type(others[0]).__name__}, which no adapter takes; attach its method's first "
                "(editeval.interfaces.attach, or load the run with editeval.revisit.load_edited)"
            )
        return weights, others

    def _check_mode(self) -> None:
        if any(module.training for module in self.lm.module.modules()):
            raise EditevalError("the model is in training mode, where dropout makes every answer random; call module.eval() first")
