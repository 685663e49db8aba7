"""What an accuracy hides: text that is no answer, one answer to everything, classes of unequal size, and guessing.

A collapsed model scores exactly 0 where its text is parsed, and a constant-label rate, which can be *better* than the unedited
model's score, where labels are compared by likelihood. These numbers stand beside every accuracy, so that both are seen.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

MAX_CLASSES = 10  # more distinct right answers than this are answers, not classes
NGRAM = 4
MIN_NGRAMS = 8  # shorter texts are not judged for repetition
MAX_REPEATED = 0.5  # a text of which more 4-grams than this repeat an earlier one goes in circles (arXiv 2410.18785, "muting effect")
MIN_CHARACTERS = 20  # a text with no 4-gram of words is judged by its characters from here on: 0.3333333333333333 is an answer
LENGTH_SLACK = 2  # text read back may be cut into slightly fewer tokens than were written


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One item with few possible answers: the right one, the one given (as text), and what it scored."""

    right: str
    given: str
    score: float


def degenerate_reasons(text: str, tokens: Sequence[Hashable]) -> tuple[str, ...]:
    """Return why a generated text is degenerate: it is `empty`, or `repeats` itself.

    It repeats itself by its 4-grams of tokens or, where it has too few words for one (`!!!!!!`, which few tokens may write), of
    characters.
    """
    written = text.strip()
    by_characters = len(written.split()) < NGRAM and len(written) >= MIN_CHARACTERS and repeated_share(written) > MAX_REPEATED
    reasons = {"empty": not written, "repeats": repeated_share(tokens) > MAX_REPEATED or by_characters}
    return tuple(name for name, holds in reasons.items() if holds)


def is_unended(tokens: Sequence[Hashable], *, max_new_tokens: int) -> bool:
    """Return whether a generated text ran into its bound, as a long answer of a sound model may too."""
    return len(tokens) >= max(1, max_new_tokens - LENGTH_SLACK)


def repeated_share(tokens: Sequence[Hashable]) -> float:
    """Return the share of 4-grams that occurred before in the sequence; 0 for one too short to judge."""
    grams = list(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if len(grams) >= MIN_NGRAMS else 0.0


def scores_by_answer(items: Sequence[Answered]) -> dict[str, list[float]]:
    """Return the scores of the items by their right answer: its mean is the recall of that class."""
    by_class: dict[str, list[float]] = defaultdict(list)
    for item in items:
        by_class[item.right].append(item.score)
    return by_class


def balanced(items: Sequence[Answered]) -> tuple[float, float | None]:
    """Return the mean over the right answers of the mean score on their items, and its standard error.

    A constant answer to K classes scores 1 / K, whatever their sizes. No error where a class has a single item.
    """
    by_class = scores_by_answer(items)
    means = [fmean(scores) for scores in by_class.values()]
    if any(len(scores) < 2 for scores in by_class.values()):
        return fmean(means), None
    squared = [
        math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores)
        for scores, mean in zip(by_class.values(), means, strict=True)
    ]
    return fmean(means), math.sqrt(math.fsum(squared)) / len(means)


def top_answer_share(items: Sequence[Answered]) -> float:
    """Return how often the most frequent answer is given; 1 for a model that says the same to everything."""
    return Counter(item.given for item in items).most_common(1)[0][1] / len(items)


def plain_answer(text: str) -> str:
    """Return an answer without case, white space and the marks around it: `" (B)."` -> `"b"`."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", text).casefold()
