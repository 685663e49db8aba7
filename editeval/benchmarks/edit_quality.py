"""Edit quality: are the edits there, do they carry over, and what did they disturb?

Everything is asked at each rung about *all* facts edited so far; at rung 0 about the facts that will be edited. The
samples hold one record a fact and metric, so that the retention matrix (fact i after n edits) is read from them alone.

| metric         | asks                               | success                                                            |
|----------------|------------------------------------|--------------------------------------------------------------------|
| efficacy       | the edited prompt                  | the new target                                                     |
| generalization | its paraphrases                    | the new target                                                     |
| portability    | what follows from the fact         | the answer that follows                                            |
| locality       | neighbours of the fact             | what the unedited model itself answers                             |
| fluency        | a longer text after the prompt     | no success: the entropy of its word n-grams, low where it repeats  |

Protocols, never averaged with one another:

- `probability`: the mean log-probability a token of the expected answer exceeds that of its rival (Meng et al. 2022,
  https://arxiv.org/abs/2202.05262, section 3.3). For neighbours this is CounterFact's neighborhood success.
- `teacher_forced`: the share of the expected answer's tokens that are the model's first choice when all earlier ones are
  given. It inflates (Yang et al. 2025, https://arxiv.org/abs/2502.11177): report it only beside a generated form.
- `generation`: the model writes freely until the line or the text ends; what it writes begins with the answer.
- `generation_contains`: the same text, with the answer anywhere in it.

`inflation` is what teacher forcing adds to efficacy: `teacher_forced` minus `generation`, paired by fact.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from editeval.benchmarks.edit_questions import (
    BaseAnswer,
    Outcome,
    Question,
    ngram_entropy,
    outcome_of,
    questions_about,
    subjects_of,
)
from editeval.benchmarks.estimates import mean_and_stderr
from editeval.inference.edited import ContinuationScore, EditedModel
from editeval.inference.encoding import answer_after
from editeval.interfaces import EvaluationContext
from editeval.types import ConfigError, EditRequest, Evaluation, Measurement, content_key, seed_for

TASK = "facts"
VERSION = "5"  # raised whenever the same model and facts would give other numbers
STOP = ("\n",)
FACTS_PER_CALL = 64  # bounds memory and paces the progress display; in float32 results do not depend on it


@dataclass(frozen=True, kw_only=True)
class EditQuality:
    """Efficacy, generalization, portability, locality and fluency of every edit so far.

    `max_new_tokens` bounds a generated answer. Fluency is that of `fluency_tokens` after the edited prompt, of at most `fluency_facts`
    facts: those whose id has the lowest hash, a sample that no order of edits favours. Zero facts: no fluency. `neighborhood_prompts` says
    how many of a fact's are asked at most, the first of its row; None: all.
    """

    max_new_tokens: int
    fluency_tokens: int
    fluency_facts: int
    neighborhood_prompts: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("max_new_tokens", 1), ("fluency_tokens", 1), ("fluency_facts", 0), ("neighborhood_prompts", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name}={value} must be at least {lowest}; set benchmark.edit-quality.{name}")

    @property
    def depends_on_requests(self) -> bool:
        """True: it asks about the edited facts."""
        return True

    def check(self) -> None:
        """Nothing on disk is needed."""

    def check_model(self, model: EditedModel) -> None:
        """Raise ConfigError when what is written leaves this model no position for a prompt."""
        positions = model.lm.description.max_positions
        for name in ("max_new_tokens", *(("fluency_tokens",) if self.fluency_facts else ())):
            if getattr(self, name) >= positions:
                raise ConfigError(
                    f"benchmark.edit-quality.{name}={getattr(self, name)} leaves no room for a prompt in the {positions} positions of "
                    f"{model.lm.description.name}; set less"
                )

    def settings(self) -> Mapping[str, Any]:
        """Return what the numbers depend on beside the model and the facts."""
        fluency = {"tokens": self.fluency_tokens, "facts": self.fluency_facts}
        # Only where it is set: what was measured without it keeps its key.
        fewer = {} if self.neighborhood_prompts is None else {"neighborhood_prompts": self.neighborhood_prompts}
        return {
            "benchmark": "edit-quality",
            "version": VERSION,
            **self._answers(),
            "fluency": fluency if self.fluency_facts else None,
            **fewer,
        }

    def _answers(self) -> Mapping[str, Any]:
        """Return what a written answer depends on."""
        return {"max_new_tokens": self.max_new_tokens, "stop": list(STOP)}

    def evaluate(self, model: EditedModel, context: EvaluationContext) -> Evaluation:
        """Ask about every fact edited so far, or, of the unedited model, about every planned one."""
        facts = list(enumerate(map(self._trimmed, context.edited or context.planned), start=1))
        subjects = subjects_of(request for _, request in facts)
        samples: list[dict[str, Any]] = []
        chunks = [facts[start : start + FACTS_PER_CALL] for start in range(0, len(facts), FACTS_PER_CALL)]
        for chunk in context.progress.track(chunks, description="edit quality", total=len(chunks)):
            base = self._base_answers(model, context, chunk)
            questions = [question for position, request in chunk for question in questions_about(position, request, subjects, base)]
            # Before the first edit the model is the unedited one: what it wrote a moment ago it would write again.
            written = {prompt: answer.text for prompt, answer in base.items()} if model.num_applied == 0 else {}
            samples.extend(_samples(questions, self._ask(model, questions, written)))
        samples.extend(self._fluency(model, facts))
        template = content_key([context.template, *STOP])[:12]
        found = (replace(measurement, shots=0, template=template) for measurement in _measurements(samples))
        return Evaluation(measurements=tuple(found), samples=tuple(samples))

    def _trimmed(self, request: EditRequest) -> EditRequest:
        return replace(request, neighborhood_prompts=request.neighborhood_prompts[: self.neighborhood_prompts])

    def _fluency(self, model: EditedModel, facts: Sequence[tuple[int, EditRequest]]) -> Iterator[dict[str, Any]]:
        """Yield one record a fact whose longer text is looked at."""
        chosen = sorted(facts, key=lambda fact: seed_for("fluency", fact[1].request_id))[: self.fluency_facts]
        if not chosen:
            return
        texts = model.generate([request.full_prompt for _, request in chosen], max_new_tokens=self.fluency_tokens)
        for (position, request), text in sorted(zip(chosen, texts, strict=True), key=lambda item: item[0][0]):
            yield {
                "request_id": request.request_id,
                "position": position,
                "metric": "fluency",
                "prompts": [request.full_prompt],
                "generated": [text],
                "entropy": ngram_entropy(text),
            }

    def _generate(self, model: EditedModel, prompts: Iterable[str]) -> dict[str, str]:
        """Complete each distinct prompt once, in one call of the engine."""
        distinct = list(dict.fromkeys(prompts))
        texts = model.generate(distinct, max_new_tokens=self.max_new_tokens, stop=STOP) if distinct else []
        return dict(zip(distinct, texts, strict=True))

    def _base_answers(
        self, model: EditedModel, context: EvaluationContext, facts: Sequence[tuple[int, EditRequest]]
    ) -> Mapping[str, BaseAnswer]:
        """Return the unedited model's own answer to every neighbourhood prompt, computed once per model and these facts.

        It is asked everything that the edited model is asked, in the same calls: in half precision the rounding of a pass depends on
        what else is in it, and a text may turn on that.
        """
        if not any(request.neighborhood_prompts for _, request in facts):
            return {}
        blank = [question for position, request in facts for question in questions_about(position, request, {}, _Blank())]

        def compute() -> dict[str, Any]:
            with model.unedited():
                texts = self._generate(model, (question.prompt for question in blank))
                own = {prompt: BaseAnswer(text=text, is_greedy=()) for prompt, text in texts.items()}
                questions = [question for position, request in facts for question in questions_about(position, request, {}, own)]
                scored = _score(model, [pair for question in questions for pair in question.pairs()])
            answers = {question.prompt: texts[question.prompt] for question in questions if question.base is not None}
            return {
                prompt: {
                    "text": text,
                    "is_greedy": list(scored[prompt, answer_after(prompt, text)].token_is_greedy) if text.strip() else [],
                }
                for prompt, text in answers.items()
            }

        asked = [[question.prompt, question.expected, question.rival] for question in blank]
        passes = {"sharing": repr(model.sharing), "rounding": model.rounding}
        key = content_key({"model": model.lm.fingerprint, "asked": asked, "version": 3, **passes, **self._answers()})
        stored = context.cache.json("base-answers", key, compute)
        return {prompt: BaseAnswer(text=entry["text"], is_greedy=tuple(entry["is_greedy"])) for prompt, entry in stored.items()}

    def _ask(self, model: EditedModel, questions: Sequence[Question], written: Mapping[str, str]) -> list[Outcome]:
        """Put all questions to the model as it is now, in one call to score and one to generate what is not `written` yet."""
        pairs = [pair for question in questions for pair in question.pairs()]
        scored = _score(model, pairs)
        generated = {**written, **self._generate(model, (question.prompt for question in questions if question.prompt not in written))}
        return [outcome_of(question, scored, generated[question.prompt]) for question in questions]


def _score(model: EditedModel, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], ContinuationScore]:
    distinct = list(dict.fromkeys(pairs))
    if not distinct:
        return {}
    scores = model.score_answers([prompt for prompt, _ in distinct], [answer for _, answer in distinct])
    return dict(zip(distinct, scores, strict=True))


class _Blank(dict[str, BaseAnswer]):
    """Answers that are not known yet."""

    def __missing__(self, prompt: str) -> BaseAnswer:
        return BaseAnswer(text="", is_greedy=())


# -- records and numbers ---------------------------------------------------------------------------------------------------

_PROTOCOLS = ("probability", "teacher_forced", "generation", "generation_contains")


def _samples(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yield one record a (fact, metric); lists run over the fact's prompts of that metric."""
    grouped: dict[tuple[int, str, str], list[tuple[Question, Outcome]]] = defaultdict(list)
    for question, outcome in zip(questions, outcomes, strict=True):
        grouped[question.position, question.request_id, question.metric].append((question, outcome))
    for (position, request_id, metric), rows in grouped.items():
        yield {
            "request_id": request_id,
            "position": position,
            "metric": metric,
            "prompts": [question.prompt for question, _ in rows],
            "expected": [question.expected for question, _ in rows],
            "rival": [question.rival for question, _ in rows],
            "unedited": [None if question.base is None else question.base.text for question, _ in rows],
            "conflict": [question.conflict for question, _ in rows],
            "generated": [outcome.generated for _, outcome in rows],
            "log_prob": [outcome.log_prob for _, outcome in rows],
            "rival_log_prob": [outcome.rival_log_prob for _, outcome in rows],
            "outcomes": {protocol: [getattr(outcome, protocol) for _, outcome in rows] for protocol in _PROTOCOLS},
        }


def _measurements(samples: Sequence[Mapping[str, Any]]) -> Iterator[Measurement]:
    """Yield every number, each the mean over facts of the mean over a fact's prompts (prompts of one fact are not independent)."""
    fluency = [record["entropy"] for record in samples if record["metric"] == "fluency"]
    for metric in ("efficacy", "generalization", "portability", "locality"):
        records = [record for record in samples if record["metric"] == metric]
        apart = metric == "locality"
        for protocol in _PROTOCOLS:
            name = "neighborhood_success" if apart and protocol == "probability" else metric
            chance = 0.5 if protocol == "probability" else None  # a model that knows neither of two answers
            yield from _measured(name, protocol, [_of_fact(record, protocol, conflict=False) for record in records], chance=chance)
        yield from _measured(f"{metric}_log_prob", "probability", [_mean_log_prob(record) for record in records])
        if metric == "efficacy":
            yield from _measured("target_probability", "probability", [fmean(map(_exp, record["log_prob"])) for record in records])
            yield from _inflation(records)
        if apart:
            clashing = [_of_fact(record, "generation", conflict=True) for record in records]
            yield from _measured("locality_conflict", "generation", clashing)
    yield from _measured("fluency", "generation", fluency)


def _inflation(records: Sequence[Mapping[str, Any]]) -> Iterator[Measurement]:
    """Yield by how much teacher forcing flatters efficacy."""
    forced = [_of_fact(record, "teacher_forced", conflict=False) for record in records]
    written = [_of_fact(record, "generation", conflict=False) for record in records]
    gaps = [None if one is None or other is None else one - other for one, other in zip(forced, written, strict=True)]
    for measurement in _measured("inflation", "teacher_forced_minus_generation", gaps):
        yield replace(measurement, higher_is_better=False)


def _of_fact(record: Mapping[str, Any], protocol: str, *, conflict: bool) -> float | None:
    """Return a fact's mean over its prompts, either those free of other facts' subjects or those about one."""
    outcomes = zip(record["outcomes"][protocol], record["conflict"], strict=True)
    kept = [outcome for outcome, clashes in outcomes if outcome is not None and clashes == conflict]
    return fmean(kept) if kept else None


def _mean_log_prob(record: Mapping[str, Any]) -> float | None:
    kept = [log_prob for log_prob, clashes in zip(record["log_prob"], record["conflict"], strict=True) if not clashes]
    return fmean(kept) if kept else None


def _exp(log_prob: float) -> float:
    return math.exp(min(log_prob, 0.0)) if not math.isnan(log_prob) else math.nan


def _measured(metric: str, protocol: str, values: Sequence[float | None], *, chance: float | None = None) -> Iterator[Measurement]:
    """Yield the mean over the facts that the metric applies to; nothing where it applies to none."""
    kept = [value for value in values if value is not None]
    if kept:
        value, stderr = mean_and_stderr(kept)
        yield Measurement(
            task=TASK, metric=metric, protocol=protocol, value=value, n=len(kept), stderr=stderr, chance=chance, version=VERSION
        )
