"""The questions that edit quality asks about one fact, and what an answer shows; no model is called here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from editeval.datasets.text import contains_answer, normalize_answer, starts_with_answer
from editeval.inference.edited import ContinuationScore
from editeval.inference.encoding import answer_after
from editeval.types import EditRequest

# A full stop ends nothing after an initial (J. K., U.S.), nor after what is put before a name.
_INITIAL_OR_TITLE = r"(?<!\b[A-ZÀ-ÖØ-Þ])(?<!\b(?:St|Mt|Ft|Dr|Mr|Ms|Lt))(?<!\b(?:Mrs|Rev|Gen|Col|Gov|Sen|Sgt|Ste))(?<!\b(?:Prof|Capt))"
_ANSWER_END = re.compile(rf"(?:[,;:!?]|{_INITIAL_OR_TITLE}\.)[.,;:!?]*(?=\s|$)|\n")


@dataclass(frozen=True, kw_only=True)
class BaseAnswer:
    """What the unedited model wrote, and at which of its tokens, read back as text, it would choose the same again."""

    text: str
    is_greedy: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt with the answer expected of it, the answer it competes with, and (locality) the unedited model's own."""

    position: int
    request_id: str
    metric: str
    prompt: str
    expected: str
    rival: str | None = None
    base: BaseAnswer | None = None
    conflict: bool = False

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield every (context, continuation) whose probability is needed."""
        yield self.prompt, answer_after(self.prompt, self.expected)
        if self.rival is not None:
            yield self.prompt, answer_after(self.prompt, self.rival)
        if self.base is not None and self.base.text.strip():
            yield self.prompt, answer_after(self.prompt, self.base.text)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a question showed; None where a protocol does not apply to it."""

    log_prob: float
    rival_log_prob: float | None
    probability: float | None
    teacher_forced: float | None
    generation: float
    generation_contains: float | None
    generated: str


def subjects_of(requests: Iterable[EditRequest]) -> Counter[str]:
    """Return how many of these facts each subject (normalised) has."""
    return Counter(normalize_answer(request.subject) for request in requests)


def questions_about(position: int, request: EditRequest, subjects: Mapping[str, int], base: Mapping[str, BaseAnswer]) -> Iterator[Question]:
    """Yield everything that is asked about one fact; `subjects` are those of all edited facts, this one's among them (`subjects_of`).

    A neighbour's prompt clashes where it names the subject of another edited fact. The fact's own subject is no clash: some data sets ask
    about other relations of it, which the edit must leave alone.
    """
    own = normalize_answer(request.subject)
    others = [subject for subject, count in subjects.items() if count > (subject == own)]

    def ask(
        metric: str, prompt: str, expected: str, rival: str | None, *, own: BaseAnswer | None = None, conflict: bool = False
    ) -> Question:
        return Question(
            position=position,
            request_id=request.request_id,
            metric=metric,
            prompt=prompt,
            expected=expected,
            rival=rival,
            base=own,
            conflict=conflict,
        )

    yield ask("efficacy", request.full_prompt, request.target_new, request.target_true)
    for prompt in request.paraphrase_prompts:
        yield ask("generalization", prompt, request.target_new, request.target_true)
    for probe in request.portability:
        yield ask("portability", probe.prompt, probe.answer, None)
    for probe in request.neighborhood_prompts:
        text = normalize_answer(probe.prompt)
        # The cheap test first: thousands of subjects meet thousands of prompts.
        conflict = any(subject in text and contains_answer(text, subject) for subject in others)
        rival = request.target_new if request.target_new != probe.answer else None
        yield ask("locality", probe.prompt, probe.answer, rival, own=base[probe.prompt], conflict=conflict)


def outcome_of(question: Question, scored: Mapping[tuple[str, str], ContinuationScore], generated: str) -> Outcome:
    """Return what the scores (of every pair of the question) and the free text show."""
    expected = scored[question.prompt, answer_after(question.prompt, question.expected)]
    rival = None if question.rival is None else scored[question.prompt, answer_after(question.prompt, question.rival)]
    if question.base is None:
        teacher_forced: float | None = fmean(expected.token_is_greedy)
        generation = float(starts_with_answer(generated, question.expected))
        contains: float | None = float(contains_answer(generated, question.expected))
    else:
        base = question.base
        again = scored[question.prompt, answer_after(question.prompt, base.text)].token_is_greedy if base.is_greedy else ()
        # Text read back may be cut into other tokens than were written; only those the unedited model chooses count.
        kept = [now for now, before in zip(again, base.is_greedy, strict=True) if before]
        teacher_forced = fmean(kept) if kept else None
        generation = float(answer_phrase(generated) == answer_phrase(base.text))
        contains = None
    return Outcome(
        log_prob=expected.log_prob,
        rival_log_prob=None if rival is None else rival.log_prob,
        probability=None if rival is None else float(_per_token(expected) > _per_token(rival)),
        teacher_forced=teacher_forced,
        generation=generation,
        generation_contains=contains,
        generated=generated,
    )


def _per_token(score: ContinuationScore) -> float:
    return score.log_prob / score.num_tokens


def ngram_entropy(text: str) -> float:
    """Return the weighted entropy of a text's word n-grams, in bits: `H2 / 3 + 2 H3 / 3` (Meng et al. 2022, generation entropy GE).

    `Hn` is `-sum_k f_k log2 f_k` over the frequencies of its n-grams; published tables multiply by 100. Words are runs of letters and
    digits, other marks stand alone; a text of fewer than n words has `Hn` 0. The bound is log2 of the number of n-grams, so that only
    texts written to the same length compare.
    """
    words = re.findall(r"\w+|[^\w\s]", text)

    def entropy(size: int) -> float:
        counts = Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
        total = counts.total()
        return math.fsum(-count / total * math.log2(count / total) for count in counts.values())

    return entropy(2) / 3 + 2 * entropy(3) / 3


def answer_phrase(text: str) -> str:
    """Return the first words up to a punctuation mark or line end, normalised: `" Paris, which"` -> `"paris"`.

    Marks before the first word are passed over; a text without any word is returned whole, so that two of them are the same only where
    they are.
    """
    phrases = (normalize_answer(phrase) for phrase in _ANSWER_END.split(text))
    return next((phrase for phrase in phrases if any(map(str.isalnum, phrase))), normalize_answer(text))
