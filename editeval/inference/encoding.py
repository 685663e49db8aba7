"""From text to token ids: contexts, continuations, and the windows of a long text.

The conventions are lm-eval's (`lm_eval.models.huggingface.HFLM` 0.4.13), so that its log-likelihoods are reproduced: white space at
a context's end belongs to the continuation, a pair is encoded whole and split after the context's tokens, an empty context is one
prefix token (beginning of sequence, else end of sequence), and what is too long loses tokens on the left.

Answers to prompts of our own are split elsewhere (`encode_answers`): where the prompt ends, white space and all, as a text is continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PreTrainedTokenizerFast

from editeval.types import EditevalError


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Token ids of a continuation and of what stands before it; neither is empty.

    The first `blanks` tokens of the continuation are white space that the request's context ends in (fewer than all).
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    blanks: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens up to where the request's context ends."""
        return len(self.context) + self.blanks


class EncodePairs(Protocol):
    """How contexts and what follows them become token ids."""

    def __call__(
        self, tokenizer: PreTrainedTokenizerFast, contexts: Sequence[str], continuations: Sequence[str], /, *, special_tokens: bool | None
    ) -> list[TokenPair]:
        """Return the token ids of each pair."""
        ...


def prefix_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that stands for an empty context: beginning of sequence, else end of sequence.

    Raises:
        EditevalError: the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise EditevalError("an empty context needs a prefix token; the tokenizer has no bos_token and no eos_token; set one of them")


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, special_tokens: bool | None) -> list[tuple[int, ...]]:
    """Return the token ids of each text.

    `special_tokens` None means the tokenizer's own default, without a second beginning-of-sequence token where the text already
    starts with one.
    """
    if special_tokens is not None:
        return _encode(tokenizer, texts, add_special_tokens=special_tokens)
    prefix_text = _prefix_text(tokenizer)
    starts = [bool(prefix_text) and text.startswith(prefix_text) for text in texts]
    bare = iter(_encode(tokenizer, [text for text, started in zip(texts, starts, strict=True) if started], add_special_tokens=False))
    full = iter(_encode(tokenizer, [text for text, started in zip(texts, starts, strict=True) if not started], add_special_tokens=True))
    return [next(bare) if started else next(full) for started in starts]


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast, contexts: Sequence[str], continuations: Sequence[str], *, special_tokens: bool | None
) -> list[TokenPair]:
    """Return the token ids of each pair, split where the context ends.

    Raises:
        EditevalError: a continuation has no token of its own.
        ValueError: unequal numbers of contexts and continuations.
    """
    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts and {len(continuations)} continuations; one continuation a context")
    stripped = [context.rstrip() for context in contexts]
    unique = list(dict.fromkeys(text for text in stripped if text))
    context_ids = dict(zip(unique, encode_texts(tokenizer, unique, special_tokens=special_tokens), strict=True))
    wholes = [context + continuation for context, continuation in zip(contexts, continuations, strict=True)]
    with_context = [whole for whole, text in zip(wholes, stripped, strict=True) if text]
    without_context = [whole for whole, text in zip(wholes, stripped, strict=True) if not text]
    split_later = iter(encode_texts(tokenizer, with_context, special_tokens=special_tokens))
    prefix_later = iter(_encode(tokenizer, without_context, add_special_tokens=False))
    pairs = []
    for text, context, continuation in zip(stripped, contexts, continuations, strict=True):
        pair = _split(next(split_later), len(context_ids[text])) if text else _with_prefix(tokenizer, next(prefix_later))
        if not pair.continuation:
            raise EditevalError(
                f"continuation {continuation!r} has no token of its own after {context[-80:]!r}; "
                "give at least one character that the tokenizer does not merge into the context"
            )
        blanks = _blank_tokens(tokenizer, context, continuation) if len(text) < len(context) else 0
        pairs.append(replace(pair, blanks=min(blanks, len(pair.continuation) - 1)))
    return pairs


def answer_after(prompt: str, answer: str) -> str:
    """Return the answer as it follows the prompt: after one space, unless the prompt ends in one.

    The space also keeps the answer's first token from merging with the prompt's last.
    """
    return answer.strip() if prompt[-1:].isspace() else f" {answer.strip()}"


def encode_answers(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str], *, special_tokens: bool | None
) -> list[TokenPair]:
    """Return the token ids of each pair, split where a model would begin to write: after the prompt as it is.

    This differs from `encode_pairs` only where a prompt ends in white space, as chat templates do: it belongs to the prompt. Prompt and
    answer are encoded each by itself where the tokenizer would merge them.

    Raises:
        EditevalError: an answer has no token of its own.
        ValueError: unequal numbers of prompts and answers.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers; one answer a prompt")
    asked = list(zip(prompts, answers, strict=True))
    plain = [pair for pair in asked if not pair[0][-1:].isspace()]
    blank_ended = [pair for pair in asked if pair[0][-1:].isspace()]
    encoded = iter(encode_pairs(tokenizer, [prompt for prompt, _ in plain], [answer for _, answer in plain], special_tokens=special_tokens))
    unique = list(dict.fromkeys(prompt for prompt, _ in blank_ended))
    context_of = dict(zip(unique, encode_texts(tokenizer, unique, special_tokens=special_tokens), strict=True))
    wholes = iter(encode_texts(tokenizer, [prompt + answer for prompt, answer in blank_ended], special_tokens=special_tokens))
    alone = iter(_encode(tokenizer, [answer for _, answer in blank_ended], add_special_tokens=False))
    pairs = []
    for prompt, answer in asked:
        if prompt not in context_of:
            pairs.append(next(encoded))
            continue
        context, whole, answer_ids = context_of[prompt], next(wholes), next(alone)
        continuation = whole[len(context) :] if whole[: len(context)] == context else answer_ids
        if not continuation:
            raise EditevalError(f"answer {answer!r} has no token of its own after {prompt[-80:]!r}; give one with text")
        pairs.append(TokenPair(context=context or (prefix_token(tokenizer),), continuation=continuation))
    return pairs


def fit(pair: TokenPair, *, max_length: int) -> TokenPair:
    """Drop context tokens on the left until all but the pair's last token fit into `max_length` positions.

    Raises:
        EditevalError: the continuation alone does not fit.
    """
    if len(pair.continuation) > max_length:
        raise EditevalError(
            f"a continuation of {len(pair.continuation)} tokens does not fit the model's {max_length} positions; "
            "shorten it, or score the text in windows with score_text"
        )
    room = max_length + 1 - len(pair.continuation)
    return replace(pair, context=pair.context[-room:])


def fitting_prefix(tokenizer: PreTrainedTokenizerFast, demonstrations: Sequence[str], prefix: str, text: str, *, room: int) -> str:
    """Return demonstrations and prefix as far as `text` behind them fits into `room` tokens.

    Demonstrations are left out from the first on; where the prefix alone does not fit, nothing stands before the text.
    """
    kept = list(demonstrations)
    while True:
        whole = "".join((*kept, prefix))
        (tokens,) = encode_texts(tokenizer, [whole + text], special_tokens=None)
        if len(tokens) <= room:
            return whole
        if not kept:
            return ""
        # Each step leaves out about as many as are too many, and one at least.
        del kept[: max(1, (len(tokens) - room) * len(kept) // len(tokens))]


def windows(tokens: Sequence[int], *, prefix: tuple[int, ...], max_length: int) -> list[TokenPair]:
    """Cut a text's tokens into windows that together score each token once.

    The first window is headed by `prefix` (at least one token, fewer than `max_length`); a later one by the token before it; the last
    one is filled up on the left with tokens that are already scored, so that all its tokens see as much as the model can.
    """
    pairs: list[TokenPair] = []
    done = 0
    while done < len(tokens):
        size = min(len(tokens) - done, max_length if done else max_length + 1 - len(prefix))
        end = done + size
        context = prefix if done == 0 else tuple(tokens[max(0, end - max_length - 1) : done])
        pairs.append(TokenPair(context=context, continuation=tuple(tokens[done:end])))
        done = end
    return pairs


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [tuple(ids) for ids in encoded["input_ids"]]


def _prefix_text(tokenizer: PreTrainedTokenizerFast) -> str:
    token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return "" if token_id is None else str(tokenizer.convert_ids_to_tokens(int(token_id)))


def _blank_tokens(tokenizer: PreTrainedTokenizerFast, context: str, continuation: str) -> int:
    """Return how many tokens of the whole text lie within the white space that the context ends in."""
    offsets = tokenizer(context + continuation, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return sum(len(context.rstrip()) < stop <= len(context) for _, stop in offsets)


def _split(whole: tuple[int, ...], length: int) -> TokenPair:
    return TokenPair(context=whole[:length], continuation=whole[length:])


def _with_prefix(tokenizer: PreTrainedTokenizerFast, tokens: tuple[int, ...]) -> TokenPair:
    prefix = prefix_token(tokenizer)
    # A text that brings its own prefix token is not given a second one.
    return _split(tokens, 1) if tokens[:1] == (prefix,) else TokenPair(context=(prefix,), continuation=tokens)
