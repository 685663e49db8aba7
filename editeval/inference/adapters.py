"""What may stand beside the weights of an edited model, and how the engine asks it.

An adapter holds the state that edits add to it, bit for bit what their deltas say. Two kinds differ in where they act:
an `ActivationAdapter` changes hidden states at one place of the model, where a prompt ends; a `RequestAdapter` changes what the
model is asked. Both act in every benchmark, and neither lets a request's answer depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from editeval.edits.delta import AdapterDelta
from editeval.inference.packing import ShareLimit

if TYPE_CHECKING:
    from editeval.inference.edited import EditedModel


@runtime_checkable
class Adapter(Protocol):
    """State beside the weights. Empty it acts as nothing at all."""

    @property
    def is_empty(self) -> bool:
        """Whether no edit has added anything since the last `clear`."""
        ...

    def check(self, deltas: Sequence[AdapterDelta]) -> None:
        """Raise the EditError that `add` would raise, and change nothing."""
        ...

    def add(self, deltas: Sequence[AdapterDelta]) -> None:
        """Take in exactly what the deltas say: all of them, or on an error none.

        Raises:
            EditError: a delta of another kind or site, a wrong shape, a number that is not finite, or nothing that is new.
        """
        ...

    def clear(self) -> None:
        """Forget every edit; what was trained or cached stays."""
        ...

    def digest(self) -> str:
        """Return the sha256 of everything that edits added; equal states have equal digests, however they came about."""
        ...

    def snapshot(self) -> tuple[AdapterDelta, ...]:
        """Return deltas that bring an empty adapter to this state."""
        ...


@dataclass(kw_only=True)
class Choice:
    """What an adapter decided where a prompt ended, for the tokens that follow it in later passes; None: nothing yet."""

    made: int | None = None


@dataclass(frozen=True, kw_only=True)
class PromptPath:
    """A prompt in a batch as the model gets it: the row, and the nodes from the prompt's first token to where the adapter looks.

    `answer` holds the nodes behind them, of every continuation in this pass. While a text is generated, one `choice` goes with its prompt
    from pass to pass, and `nodes` holds the new token.
    """

    row: int
    nodes: tuple[int, ...]
    answer: tuple[int, ...] = ()
    choice: Choice = field(default_factory=Choice)


class PassAdapter(Protocol):
    """What the engine asks of an adapter that stands in the model while prompts pass."""

    @property
    def every_step(self) -> bool:
        """Whether it acts on newly generated tokens too."""
        ...

    @property
    def sharing(self) -> Hashable:
        """What `query_position` and `shareable` depend on beside their arguments: while it is the same, packed rows may be used again."""
        ...

    @property
    def acts_in_texts(self) -> bool:
        """Whether it acts in a text that is scored as a whole, each window of which is then a prompt without an answer."""
        ...

    def query_position(self, *, prompt_tokens: int, tokens: int) -> int:
        """Return where in a sequence of `tokens` tokens, the first `prompt_tokens` of them the prompt, it looks."""
        ...

    def shareable(self, first: int, second: int, shared: int) -> int:
        """Return how many of their `shared` equal first tokens two sequences may have in common, given where it looks in each."""
        ...

    def active(self, module: PreTrainedModel, prompts: Sequence[PromptPath]) -> AbstractContextManager[None]:
        """Return a context within which a forward pass over these prompts is that of the edited model."""
        ...


@runtime_checkable
class ActivationAdapter(Adapter, PassAdapter, Protocol):
    """Changes hidden states at one place of the model, depending on what they are where the prompt ends."""


@runtime_checkable
class ObservableAdapter(ActivationAdapter, Protocol):
    """An activation adapter that decides by hidden states that no edit changes: what it saw once tells what it would do later."""

    @property
    def observable(self) -> bool:
        """Whether that is so with its settings."""
        ...

    def observing(self, module: PreTrainedModel, prompts: Sequence[PromptPath], seen: list[Tensor]) -> AbstractContextManager[None]:
        """Return a context within which a pass over these prompts puts what it decides by, (P, D) on the CPU, into `seen`."""
        ...

    def reaches(self, seen_PD: Tensor) -> bool:
        """Return whether it would change anything for any of these."""
        ...


@dataclass(frozen=True, kw_only=True)
class Route:
    """How a request is answered: with `demonstrations` and `prefix` before its text, by `model` (None: the edited model itself).

    Where the model has no room for all of that, demonstrations are left out, the first of them first; where even the prefix has none, the
    request is asked as it is.
    """

    prefix: str
    demonstrations: tuple[str, ...] = ()
    model: EditedModel | None = None


@runtime_checkable
class RequestAdapter(Adapter, Protocol):
    """Decides, request by request, what is asked of which model."""

    def routes(self, contexts: Sequence[str]) -> Sequence[Route | None]:
        """Return each request's route; None leaves it as it is. A route depends on its own request alone."""
        ...


class Around:
    """A `PassAdapter` that is as the one within it, but for what it says itself."""

    def __init__(self, within: PassAdapter) -> None:
        self._within = within

    @property
    def every_step(self) -> bool:
        """As of the adapter within."""
        return self._within.every_step

    @property
    def sharing(self) -> Hashable:
        """As of the adapter within."""
        return self._within.sharing

    @property
    def acts_in_texts(self) -> bool:
        """As of the adapter within."""
        return self._within.acts_in_texts

    def query_position(self, *, prompt_tokens: int, tokens: int) -> int:
        """Return where the adapter within looks."""
        return self._within.query_position(prompt_tokens=prompt_tokens, tokens=tokens)

    def shareable(self, first: int, second: int, shared: int) -> int:
        """Return what may be shared under the adapter within."""
        return self._within.shareable(first, second, shared)

    def active(self, module: PreTrainedModel, prompts: Sequence[PromptPath]) -> AbstractContextManager[None]:
        """Return the context of the adapter within."""
        return self._within.active(module, prompts)


class WithoutAnswer(Around):
    """An adapter in windows of text: all tokens of each are the prompt."""

    def query_position(self, *, prompt_tokens: int, tokens: int) -> int:
        """Return where the adapter looks in a prompt of all these tokens."""
        del prompt_tokens
        return super().query_position(prompt_tokens=tokens, tokens=tokens)


def share_limit(adapter: PassAdapter, queries: Sequence[int]) -> ShareLimit:
    """Return the rule of packing under an adapter that looks at token `queries[i]` of pair i."""

    def limit(first: int, second: int, shared: int) -> int:
        return adapter.shareable(queries[first], queries[second], shared)

    return limit
