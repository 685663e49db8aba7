"""When a text that is being written ends, and what of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.inference.adapters import Choice

STOP_TAIL_TOKENS = 8  # tokens beyond a stop string's length in which it is looked for; the text is cut exactly at the end


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """When decoding ends: new tokens, stop strings and the model's positions."""

    max_new_tokens: int
    stop: tuple[str, ...]
    max_length: int


@dataclass(kw_only=True)
class Live:
    """A context that is being continued."""

    context: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)


class Ending:
    """Says of each text whether it has ended: by an end token, a stop string, or its length."""

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, limits: GenerationLimits) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(term for term in limits.stop if term)
        self._longest = max((len(term) for term in self._stop), default=0)
        self._ends = end_tokens(module, tokenizer)
        self._max_new_tokens = limits.max_new_tokens

    def reached(self, row: Live) -> bool:
        """Return whether the row's text is complete with its newest token."""
        generated = row.generated
        return len(generated) >= self._max_new_tokens or generated[-1] in self._ends or self._stopped(generated)

    def text(self, row: Live) -> str:
        """Return the row's text up to its first stop string."""
        return cut_at_stop(_decode(self._tokenizer, row.generated), self._stop)

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


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the earliest stop string (empty stop strings stop nothing)."""
    found = [position for term in stop if term and (position := text.find(term)) >= 0]
    return text[: min(found)] if found else text


def end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the ids that end a text: the generation config's and the tokenizer's."""
    configured = module.generation_config.eos_token_id if module.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(int(token_id) for token_id in ids)


def _decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
