"""Is this the answer? Comparing generated text with an expected answer, the one way for filter and metrics alike.

Case, Unicode form and white space do not count; word boundaries do: `19` is not the answer `1998` nor `Paris` `Parisian`.
"""

from __future__ import annotations

import unicodedata

OPENING_MARKS = "\"'“”‘’«([{*_`"
NUMBER_MARKS = ".,:"


def normalize_answer(text: str) -> str:
    """Return the text in NFKC, case-folded, each run of white space one blank, none at the ends.

    Idempotent. Folding follows the compatibility caseless match of the Unicode Standard (chapter 3.13, D146), so `STRASSE`
    equals `straße` and a full-width letter its plain form.
    """
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", text).casefold()).casefold()
    # White space goes last: NFKC turns some marks into blanks (U+00B4 into U+0020 U+0301).
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def starts_with_answer(generated: str, answer: str) -> bool:
    """Return whether the generated text begins with the answer and the answer ends there at a word boundary.

    Quotation and emphasis marks before the first word (`"Paris"`, `**Paris**`) are passed over. An empty answer begins nothing.
    """
    wanted = normalize_answer(answer)
    if not wanted:
        return False
    text = normalize_answer(generated)
    return any(_stands_at(candidate, wanted, 0) for candidate in (text, text.lstrip(OPENING_MARKS + " ")))


def contains_answer(generated: str, answer: str) -> bool:
    """Return whether the answer stands anywhere in the generated text, with a word boundary on both sides.

    An empty answer is contained nowhere.
    """
    wanted = normalize_answer(answer)
    if not wanted:
        return False
    text = normalize_answer(generated)
    start = text.find(wanted)
    while start >= 0:
        if _stands_at(text, wanted, start):
            return True
        start = text.find(wanted, start + 1)
    return False


def is_word_character(character: str) -> bool:
    """Return whether a character is part of a word: a letter, a digit, an underscore or a combining mark."""
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _stands_at(text: str, wanted: str, start: int) -> bool:
    end = start + len(wanted)
    return text.startswith(wanted, start) and _is_boundary(text, start) and _is_boundary(text, end)


def _is_boundary(text: str, position: int) -> bool:
    """Whether a word or a number may end or begin between text[position - 1] and text[position]."""
    if position <= 0 or position >= len(text):
        return True
    before, after = text[position - 1], text[position]
    if is_word_character(before) and is_word_character(after):
        return False
    if before.isdigit() and after in NUMBER_MARKS:  # 3 is not the answer of 3.5, nor 1 of 1,000
        return not text[position + 1 : position + 2].isdigit()
    if before in NUMBER_MARKS and after.isdigit():
        return not text[max(position - 2, 0) : position - 1].isdigit()
    return True
