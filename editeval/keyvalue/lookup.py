"""From a fact to token ids: where its subject ends and where its target is predicted.

Positions come from the character offsets of the whole text, never from encoding a part of it: beginning-of-sequence
tokens, SentencePiece's blanks and byte-level merges then need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from editeval.types import EditError, EditRequest

BARE = "{}"
"""The context prefix that adds nothing: the prompt as it is."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """A prompt as token ids (special tokens of the tokenizer included).

    `subject_last` is the position of the subject's last token; `target_start` that of the target's first one, or the number
    of tokens where there is no target.
    """

    token_ids: tuple[int, ...]
    subject_last: int
    target_start: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.token_ids[self.target_start :]

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What the model is given: nothing is predicted after the target's last token, so that one is left out."""
        return self.token_ids[:-1] if self.target_ids else self.token_ids

    @property
    def scored_positions(self) -> tuple[int, ...]:
        """Where in `input_ids` each token of the target is predicted."""
        return tuple(range(self.target_start - 1, len(self.token_ids) - 1))


def locate(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    subject: str,
    *,
    target: str | None = None,
    context: str = BARE,
    max_tokens: int | None = None,
    request_id: str = "",
) -> Located:
    """Encode `context` around `template` around `subject`, with `target` after it, and find the subject's last token.

    The target is joined with exactly one blank, the way the text would be written, or none at the start of a line (where chat
    templates let an answer begin); the tokenizer decides what that blank becomes. White space at the subject's end does not count
    as the subject.

    Raises:
        EditError: the tokens up to the subject's last one change when the target follows (the key would then be another
            one than at inference), the prompt has no token of the subject, or it is longer than `max_tokens`.
    """
    before, after = _split(context, "context prefix", request_id)
    head, tail = _split(template, "prompt", request_id)
    start = len(before) + len(head)
    end = start + len(subject.rstrip())
    prompt = before + head + subject + tail + after
    ids, subject_last = _encode(tokenizer, prompt, start, end, request_id)
    target_start = len(ids)
    if target is not None:
        stem = prompt.rstrip(" ")
        full = stem + ("" if stem.endswith("\n") else " ") + target.strip()
        full_ids, offsets = _tokens(tokenizer, full)
        if full_ids[: subject_last + 1] != ids[: subject_last + 1]:
            raise EditError(
                f"the tokens up to the end of subject {subject!r} change when target {target!r} follows {prompt!r}; "
                "put a word or punctuation between subject and target in the prompt",
                request_ids=[request_id],
            )
        ids = full_ids
        target_start = next(position for position, (_, stop) in enumerate(offsets) if stop > len(stem))
        if target_start <= subject_last:
            raise EditError(
                f"target {target!r} begins inside the subject's last token of {prompt!r}; put a word between them", request_ids=[request_id]
            )
    if max_tokens is not None and len(ids) > max_tokens:
        raise EditError(
            f"the prompt and target have {len(ids)} tokens, the model takes at most {max_tokens}; shorten the prompt or the context prefix",
            request_ids=[request_id],
        )
    return Located(token_ids=tuple(ids), subject_last=subject_last, target_start=target_start)


def locate_request(
    tokenizer: PreTrainedTokenizerFast, request: EditRequest, contexts: Sequence[str], *, max_tokens: int | None = None
) -> tuple[Located, ...]:
    """Encode a request once a context prefix, each with the new target; the order is that of `contexts`.

    Raises:
        EditError: see `locate`; it carries the request's id.
    """
    return tuple(
        locate(
            tokenizer,
            request.prompt,
            request.subject,
            target=request.target_new,
            context=context,
            max_tokens=max_tokens,
            request_id=request.request_id,
        )
        for context in contexts
    )


def _split(template: str, what: str, request_id: str) -> tuple[str, str]:
    if template.count(BARE) != 1:
        raise EditError(f"{what} {template!r} holds {template.count(BARE)} placeholders '{{}}'; exactly one", request_ids=[request_id])
    head, _, tail = template.partition(BARE)
    return head, tail


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, start: int, end: int, request_id: str) -> tuple[list[int], int]:
    ids, offsets = _tokens(tokenizer, prompt)
    # The last token that shares a character with the subject; a character split over several tokens gives them all its span.
    inside = [position for position, (first, stop) in enumerate(offsets) if first < end and stop > start and stop > first]
    if not inside:
        raise EditError(
            f"no token of {prompt!r} holds the subject {prompt[start:end]!r}; check the tokenizer and the subject", request_ids=[request_id]
        )
    return ids, inside[-1]


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and character spans; special tokens that the tokenizer puts at the end are left out."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, offsets, special = encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"]
    size = len(ids)
    while size and special[size - 1] and offsets[size - 1][0] == offsets[size - 1][1]:
        size -= 1
    return list(ids[:size]), [(int(first), int(stop)) for first, stop in offsets[:size]]


def leading_special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer puts before every text (BOS, or none)."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    count = next(position for position, is_special in enumerate(special) if not is_special)
    return tuple(ids[:count])
