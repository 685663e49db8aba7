"""When a text that is being written ends, and what of it counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.inference.adapters import Choice
from editeval.models.model import end_tokens
from editeval.types import ConfigError

STOP_TAIL_TOKENS = 8  # tokens beyond a stop string's length in which it is looked for; the text is cut exactly at the end
LONGEST_PERIOD = 32  # tokens; a loop of longer periods is not looked for
SHORTEST_LOOP = 32  # tokens; a few equal ones in a row (digits, blanks, a ruled line) are no loop yet


@dataclass(frozen=True, kw_only=True)
class EarlyStops:
    """Ends of a text before its bound, where what is scored is known already; None: off.

    `loop_repeats`: the newest tokens are one period (of at most `LONGEST_PERIOD` tokens) so many times over, and `SHORTEST_LOOP` tokens at
    least. The period is then written on to the bound, which is what decoding does next, as far as one can tell: the model sees the same
    tokens again, but one position later, so that greedy decoding could in principle leave the loop.

    `answer_pattern`: a regular expression; the text ends behind its first match. For answers that are read by the first match of a pattern.
    It must hold the character that ends the answer (`12.\n`, not `12`), or an answer is cut in the middle.

    Raises:
        ConfigError: fewer than two repeats, or what is no regular expression, or one that matches an empty text.
    """

    loop_repeats: int | None = None
    answer_pattern: str | None = None

    def __post_init__(self) -> None:
        repeats, pattern = self.loop_repeats, self.answer_pattern
        if repeats is not None and (isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 2):
            raise ConfigError(f"loop_repeats={repeats!r} must be a whole number of at least 2, or null")
        if pattern is None:
            return
        try:
            matches_nothing = re.search(pattern, "") is not None
        except (re.error, TypeError) as error:
            raise ConfigError(f"answer_pattern={pattern!r} is no regular expression: {error}; correct it, or set null") from error
        if matches_nothing:
            raise ConfigError(
                f"answer_pattern={pattern!r} matches an empty text, so that nothing would be written; correct it, or set null"
            )


NO_EARLY_STOPS = EarlyStops()


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """When decoding ends: new tokens, stop strings, the model's positions, and what ends a text before its bound."""

    max_new_tokens: int
    stop: tuple[str, ...]
    max_length: int
    early: EarlyStops = NO_EARLY_STOPS


@dataclass(kw_only=True)
class Live:
    """A context that is being continued."""

    context: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)


class Ending:
    """Says of each text whether it has ended: by an end token, a stop string, its length, or an early stop."""

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, limits: GenerationLimits) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(term for term in limits.stop if term)
        self._longest = max((len(term) for term in self._stop), default=0)
        self._ends = end_tokens(module, tokenizer)
        self._max_new_tokens = limits.max_new_tokens
        self._loop_repeats = limits.early.loop_repeats
        self._answer = None if limits.early.answer_pattern is None else re.compile(limits.early.answer_pattern)

    def reached(self, row: Live) -> bool:
        """Return whether the row's text is complete with its newest token."""
        generated = row.generated
        return (
            len(generated) >= self._max_new_tokens
            or generated[-1] in self._ends
            or self._stopped(generated)
            or self._period(generated) is not None
            or (self._answer is not None and self._answer.search(_decode(self._tokenizer, generated)) is not None)
        )

    def text(self, row: Live) -> str:
        """Return the row's text, a loop written on to the bound, up to its first stop string and its answer's end."""
        generated = row.generated
        period = self._period(generated)
        if period is not None:
            generated = continued(generated, period, self._max_new_tokens)
        text = cut_at_stop(_decode(self._tokenizer, generated), self._stop)
        answer = None if self._answer is None else self._answer.search(text)
        return text if answer is None else text[: answer.end()]

    def _period(self, generated: Sequence[int]) -> int | None:
        return None if self._loop_repeats is None else loop_period(generated, self._loop_repeats)

    def _stopped(self, generated: Sequence[int]) -> bool:
        """Return whether the text so far holds a stop string, wherever its tokens' borders are."""
        if not self._stop:
            return False
        # A stop string of n characters ends in this token and spans few more than n tokens: the tail decides in constant time.
        tail = _decode(self._tokenizer, generated[-(self._longest + STOP_TAIL_TOKENS) :])
        if not any(term in tail for term in self._stop):
            return False
        text = _decode(self._tokenizer, generated)
        return any(term in text for term in self._stop)


def loop_period(tokens: Sequence[int], repeats: int) -> int | None:
    """Return the shortest period that the last tokens are `repeats` times over, and `SHORTEST_LOOP` tokens at least; None: no loop."""
    for period in range(1, LONGEST_PERIOD + 1):
        size = max(period * repeats, SHORTEST_LOOP)
        if size > len(tokens):
            continue
        # Most texts are no loop, and one comparison says so.
        if tokens[-1] == tokens[-1 - period] and list(tokens[-size : len(tokens) - period]) == list(tokens[len(tokens) - size + period :]):
            return period
    return None


def continued(tokens: Sequence[int], period: int, size: int) -> list[int]:
    """Return `size` tokens: these, and their last period over and over."""
    written = list(tokens[:size])
    last = tokens[-period:]
    return [*written, *(last[number % period] for number in range(size - len(written)))]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the earliest stop string (empty stop strings stop nothing)."""
    found = [position for term in stop if term and (position := text.find(term)) >= 0]
    return text[: min(found)] if found else text


def _decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
