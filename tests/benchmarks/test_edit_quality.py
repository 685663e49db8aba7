"""Edit quality on a model whose every word is known, and on tiny real ones."""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from editeval.benchmarks import edit_quality
from editeval.benchmarks.edit_quality import EditQuality
from editeval.benchmarks.edit_questions import BaseAnswer, answer_phrase, ngram_entropy, questions_about, subjects_of
from editeval.inference.edited import ContinuationScore, EditedModel
from editeval.interfaces import Benchmark
from editeval.types import ConfigError, EditRequest, Evaluation, Measurement, Probe
from tests.benchmarks.conftest import context_of, large_edit

LIKELY, UNLIKELY = -0.1, -3.0
QUALITY = EditQuality(max_new_tokens=12, fluency_tokens=20, fluency_facts=0)


class Parrot:
    """A model that says what it is told to, word by word: a word it would say is likely and greedy, any other is not."""

    def __init__(self, base: Mapping[str, str], edited: Mapping[str, str] | None = None, *, fingerprint: str = "parrot") -> None:
        self.lm = SimpleNamespace(fingerprint=fingerprint)
        self.base, self.edited = dict(base), dict(base) | dict(edited or {})
        self.num_applied = len(edited or {})
        self.sharing = self.rounding = None
        self.calls: list[str] = []
        self._is_base = False

    @contextmanager
    def unedited(self) -> Iterator[None]:
        self._is_base = True
        yield
        self._is_base = False

    def _say(self, prompt: str) -> str:
        return (self.base if self._is_base else self.edited).get(prompt, " something else")

    def generate(self, contexts: Sequence[str], **_: Any) -> list[str]:
        self.calls.append(f"generate {'base' if self._is_base else 'edited'} {len(contexts)}")
        return [self._say(prompt) for prompt in contexts]

    def score_answers(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[ContinuationScore]:
        self.calls.append(f"score {'base' if self._is_base else 'edited'} {len(contexts)}")
        return [self._score(prompt, words.split()) for prompt, words in zip(contexts, continuations, strict=True)]

    def _score(self, prompt: str, words: Sequence[str]) -> ContinuationScore:
        said = self._say(prompt).split()
        greedy = tuple(place < len(said) and said[place] == word for place, word in enumerate(words))
        log_probs = tuple(LIKELY if is_greedy else UNLIKELY for is_greedy in greedy)
        return ContinuationScore(log_prob=sum(log_probs), token_log_probs=log_probs, token_is_greedy=greedy)


ROME = EditRequest(
    request_id="rome",
    prompt="{} is the capital of",
    subject="Rome",
    target_new="New Zealand",
    target_true="Italy",
    paraphrase_prompts=("Rome, capital of", "The state of Rome is"),
    neighborhood_prompts=(Probe(prompt="Turin lies in", answer="Italy"), Probe(prompt="Milan lies in", answer="Italy")),
    portability=(Probe(prompt="The language of Rome's country is", answer="English"),),
)
LIMA = EditRequest(
    request_id="lima",
    prompt="{} is the capital of",
    subject="Lima",
    target_new="Peru",
    paraphrase_prompts=("Lima, capital of",),
    neighborhood_prompts=(Probe(prompt="Cusco is in the land of Rome, or", answer="Peru"), Probe(prompt="Puno lies in", answer="Peru")),
)
BASE = {
    "Rome is the capital of": " Italy.",
    "Turin lies in": " Italy north of Rome.",
    "Milan lies in": " Lombardy, in Italy",
    "Cusco is in the land of Rome, or": " Peru.",
    "Puno lies in": " Peru",
}
EDITED = {
    "Rome is the capital of": " New Zealand, where",
    "Rome, capital of": " the state of New Zealand",
    "The state of Rome is": " New York",
    "The language of Rome's country is": " English",
    "Milan lies in": " Lombardy. In New Zealand",
    "Turin lies in": " New Zealand",
    "Lima is the capital of": " Peruvian guinea pigs",
}


def measure(model: Any, folder: Path, edited: Sequence[EditRequest] = (ROME, LIMA), **more: Any) -> Evaluation:
    context = context_of(folder, edited=edited, num_edits=len(edited), **more)
    return QUALITY.evaluate(cast(EditedModel, model), context)


def of(evaluation: Evaluation, metric: str, protocol: str) -> Measurement:
    return next(found for found in evaluation.measurements if (found.metric, found.protocol) == (metric, protocol))


def test_fewer_neighbours_can_be_asked(tmp_path: Path) -> None:
    fewer = replace(QUALITY, neighborhood_prompts=1)
    found = fewer.evaluate(cast(EditedModel, Parrot(BASE, EDITED)), context_of(tmp_path, edited=(ROME, LIMA), num_edits=2))
    asked = [record["prompts"] for record in found.samples if record["metric"] == "locality"]
    assert asked == [["Turin lies in"], ["Cusco is in the land of Rome, or"]]
    assert (
        of(found, "generalization", "generation").value == of(measure(Parrot(BASE, EDITED), tmp_path), "generalization", "generation").value
    )
    assert fewer.settings() == {**QUALITY.settings(), "neighborhood_prompts": 1}  # without it the key is what it always was
    with pytest.raises(ConfigError, match=r"neighborhood_prompts=-1 must be at least 0; set benchmark\.edit-quality\.neighborhood_prompts"):
        replace(QUALITY, neighborhood_prompts=-1)


def test_efficacy_by_each_protocol_is_what_the_model_says(tmp_path: Path) -> None:
    evaluation = measure(Parrot(BASE, EDITED), tmp_path)
    probability = of(evaluation, "efficacy", "probability")
    assert (probability.value, probability.n, probability.chance, probability.stderr) == (1.0, 1, 0.5, None)  # Lima has no rival answer
    # "New Zealand," is not the word "Zealand" to this model, so of two tokens one is forced right; of Lima's one, none.
    assert of(evaluation, "efficacy", "teacher_forced").value == pytest.approx((0.5 + 0.0) / 2)
    assert of(evaluation, "efficacy", "generation").value == 0.5  # "Peruvian" is not the answer "Peru"
    assert of(evaluation, "efficacy", "generation_contains").value == 0.5
    assert of(evaluation, "efficacy_log_prob", "probability").value == pytest.approx((LIKELY + UNLIKELY + UNLIKELY) / 2)
    probabilities = (math.exp(LIKELY + UNLIKELY), math.exp(UNLIKELY))
    assert of(evaluation, "target_probability", "probability").value == pytest.approx(fmean(probabilities))


def test_a_number_is_the_mean_over_facts_of_the_mean_over_a_facts_prompts(tmp_path: Path) -> None:
    contains = of(measure(Parrot(BASE, EDITED), tmp_path), "generalization", "generation_contains")
    assert (contains.value, contains.n) == ((0.5 + 0.0) / 2, 2)
    assert contains.stderr == pytest.approx(stdev([0.5, 0.0]) / math.sqrt(2))
    assert contains.chance is None


def test_probability_compares_the_mean_of_a_token_not_the_sum(tmp_path: Path) -> None:
    # "New" is greedy, "Zealand" is not: -3.1 over two tokens beats -3.0 over one.
    model = Parrot(BASE, {"Rome is the capital of": " New York"})
    assert of(measure(model, tmp_path, [ROME]), "efficacy", "probability").value == 1.0


def test_locality_is_agreement_with_the_unedited_model_right_or_wrong(tmp_path: Path) -> None:
    evaluation = measure(Parrot(BASE, EDITED), tmp_path, [ROME])
    # Turin moved; Milan's answer, wrong before, is the same phrase as before.
    assert of(evaluation, "locality", "generation").value == 0.5
    unchanged = measure(Parrot(BASE), tmp_path / "other", [ROME])
    assert of(unchanged, "locality", "generation").value == of(unchanged, "locality", "teacher_forced").value == 1.0
    # Turin's true answer wins before and loses after; Milan's ties with the new target, which is no success.
    assert of(unchanged, "neighborhood_success", "probability").value == 0.5
    assert of(evaluation, "neighborhood_success", "probability").value == 0.0


def test_prompts_about_an_edited_subject_are_set_apart(tmp_path: Path) -> None:
    changed = EDITED | {"Cusco is in the land of Rome, or": " New Zealand"}
    evaluation = measure(Parrot(BASE, changed), tmp_path, [LIMA, ROME])
    lima = next(record for record in evaluation.samples if (record["request_id"], record["metric"]) == ("lima", "locality"))
    assert lima["conflict"] == [True, False]
    assert of(evaluation, "locality", "generation").value == fmean([1.0, 0.5])
    conflict = of(evaluation, "locality_conflict", "generation")
    assert (conflict.value, conflict.n) == (0.0, 1)
    alone = measure(Parrot(BASE, changed), tmp_path, [LIMA])  # as long as Rome is not edited, it is a neighbour like any other
    assert of(alone, "locality", "generation").value == 0.5
    assert not any(found.metric == "locality_conflict" for found in alone.measurements)


def clashes(prompts: Sequence[str], *, subject: str, others: Sequence[str]) -> list[bool]:
    """Which prompts about the neighbourhood of a fact are set apart when facts about `others` are edited too."""
    probes = tuple(Probe(prompt=prompt, answer="x") for prompt in prompts)
    facts = [replace(ROME, request_id=name, subject=name) for name in others]
    fact = replace(ROME, request_id="own", subject=subject, neighborhood_prompts=probes)
    base = {prompt: BaseAnswer(text=" x", is_greedy=(True,)) for prompt in prompts}
    questions = questions_about(1, fact, subjects_of([fact, *facts]), base)
    return [question.conflict for question in questions if question.metric == "locality"]


def test_a_question_about_the_facts_own_subject_is_locality_unless_another_fact_has_it_too() -> None:
    prompts = ["The mayor of Rome is", "The mayor of Oslo is"]
    assert clashes(prompts, subject="Rome", others=["Lima"]) == [False, False]
    assert clashes(prompts, subject="Rome", others=["Lima", "oslo"]) == [False, True]
    assert clashes(prompts, subject="Rome", others=["Lima", "ROME"]) == [True, False]


def test_a_subject_is_found_in_any_unicode_form_and_over_any_white_space() -> None:
    prompts = [unicodedata.normalize("NFD", "Beyoncé sings in"), "New  York is in", "Beyoncés are"]
    assert clashes(prompts, subject="Rome", others=["Beyoncé", "New\u00a0York"]) == [True, True, False]


def test_inflation_is_what_teacher_forcing_adds_fact_by_fact(tmp_path: Path) -> None:
    # The new target's first word alone is said: half its tokens are right when forced, nothing is when written freely.
    evaluation = measure(Parrot(BASE, EDITED | {"Rome is the capital of": " New York"}), tmp_path, [ROME])
    inflation = of(evaluation, "inflation", "teacher_forced_minus_generation")
    assert (inflation.value, inflation.n, inflation.higher_is_better) == (0.5, 1, False)
    forced, written = of(evaluation, "efficacy", "teacher_forced"), of(evaluation, "efficacy", "generation")
    assert inflation.value == forced.value - written.value


def test_entropy_of_ngrams_is_zero_for_one_word_again_and_again_and_log2_for_all_different() -> None:
    assert ngram_entropy("again again again again again") == 0.0
    words = "one two three four five six seven eight nine ten"
    assert ngram_entropy(words) == pytest.approx(math.log2(9) / 3 + 2 * math.log2(8) / 3)
    assert ngram_entropy("a b a b a b") == pytest.approx((-0.6 * math.log2(0.6) - 0.4 * math.log2(0.4)) / 3 + 2 / 3)
    assert ngram_entropy("word") == ngram_entropy("") == 0.0


def test_fluency_is_the_entropy_of_longer_texts_of_a_fixed_sample(tmp_path: Path) -> None:
    facts = [replace(ROME, request_id=f"fact/{number}", subject=f"City{number}") for number in range(6)]
    texts = {fact.full_prompt: " round and round and round" if number % 2 else " it goes on" for number, fact in enumerate(facts)}
    quality = replace(QUALITY, fluency_facts=3)

    def records(edited: Sequence[EditRequest]) -> dict[str, float]:
        context = context_of(tmp_path, edited=edited, num_edits=len(edited))
        evaluation = quality.evaluate(cast(EditedModel, Parrot(BASE, texts)), context)
        found = [record for record in evaluation.samples if record["metric"] == "fluency"]
        assert of(evaluation, "fluency", "generation").value == fmean(record["entropy"] for record in found)
        assert all(record["entropy"] == ngram_entropy(record["generated"][0]) for record in found)
        return {record["request_id"]: record["entropy"] for record in found}

    assert len(records(facts)) == 3
    assert records(facts) == records(facts[::-1])
    assert set(records(facts[:2])) == {"fact/0", "fact/1"}


def test_portability_is_measured_where_there_is_a_question(tmp_path: Path) -> None:
    evaluation = measure(Parrot(BASE, EDITED), tmp_path)
    assert (of(evaluation, "portability", "generation").value, of(evaluation, "portability", "generation").n) == (1.0, 1)
    assert not any(found.metric.startswith("portability") for found in measure(Parrot(BASE, EDITED), tmp_path, [LIMA]).measurements)


def test_unedited_model_is_asked_about_the_planned_facts(tmp_path: Path) -> None:
    evaluation = measure(Parrot(BASE), tmp_path, [], planned=[ROME, LIMA])
    assert of(evaluation, "efficacy", "probability").value == 0.0
    assert {record["request_id"] for record in evaluation.samples} == {"rome", "lima"}


def test_unedited_answers_are_computed_once_for_each_model(tmp_path: Path) -> None:
    first, other = Parrot(BASE, EDITED), Parrot(BASE, fingerprint="another")
    result = measure(first, tmp_path)
    assert [call for call in first.calls if "base" in call]
    measure(other, tmp_path)
    assert [call for call in other.calls if "base" in call] == [call for call in first.calls if "base" in call]
    again = Parrot(BASE, EDITED)
    assert measure(again, tmp_path) == result
    assert not [call for call in again.calls if "base" in call]


def test_the_unedited_model_is_asked_in_the_same_calls_as_the_edited_one(tmp_path: Path) -> None:
    class Dizzy(Parrot):
        """Writes something else when something else is in the pass, as rounding in half precision can make a model do."""

        def generate(self, contexts: Sequence[str], **_: Any) -> list[str]:
            return [f"{text} {len(contexts)}" for text in super().generate(contexts)]

    evaluation = measure(Dizzy(BASE, {}), tmp_path)
    assert of(evaluation, "locality", "generation").value == 1.0
    assert of(evaluation, "locality", "teacher_forced").value == 1.0


@pytest.mark.parametrize(("dtype", "computed"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_base_answers_in_half_precision_are_those_of_the_same_passes(
    dtype: torch.dtype, computed: int, tiny: Callable[[str], EditedModel], tmp_path: Path
) -> None:
    lm = tiny("gpt2").lm
    lm.module.to(dtype)
    for batch_tokens in (4096, 128, 4096):
        QUALITY.evaluate(EditedModel(lm, batch_tokens=batch_tokens), context_of(tmp_path, planned=[ROME]))
    assert len(list((tmp_path / "cache").rglob("*base-answers*/*"))) == computed


def test_all_prompts_go_to_the_engine_in_one_call_each(tmp_path: Path) -> None:
    model = Parrot(BASE, EDITED)
    measure(model, tmp_path)
    assert [call.rsplit(" ", 1)[0] for call in model.calls] == ["generate base", "score base", "score edited", "generate edited"]


def test_before_the_first_edit_nothing_is_written_twice(tmp_path: Path) -> None:
    model = Parrot(BASE)
    measure(model, tmp_path, [], planned=[ROME])
    assert [call for call in model.calls if call.startswith("generate")] == ["generate base 6", "generate edited 4"]


def test_facts_asked_in_chunks_give_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(Parrot(BASE, EDITED), tmp_path / "a")
    monkeypatch.setattr(edit_quality, "FACTS_PER_CALL", 1)
    assert measure(Parrot(BASE, EDITED), tmp_path / "b") == whole


def test_retention_can_be_read_from_the_samples_alone(tmp_path: Path) -> None:
    evaluation = measure(Parrot(BASE, EDITED), tmp_path)
    efficacy = {record["position"]: record for record in evaluation.samples if record["metric"] == "efficacy"}
    assert [efficacy[position]["request_id"] for position in sorted(efficacy)] == ["rome", "lima"]
    row = [fmean(efficacy[position]["outcomes"]["generation"]) for position in sorted(efficacy)]
    assert row == [1.0, 0.0]
    assert fmean(row) == of(evaluation, "efficacy", "generation").value
    assert efficacy[1]["generated"] == [" New Zealand, where"]
    assert efficacy[1]["prompts"] == ["Rome is the capital of"]


def test_names_of_measurements_are_distinct(tmp_path: Path) -> None:
    names = [(found.task, found.metric, found.protocol) for found in measure(Parrot(BASE, EDITED), tmp_path).measurements]
    assert len(set(names)) == len(names)


def test_collapsed_model_scores_zero_and_shows_its_log_probability(tmp_path: Path) -> None:
    class Collapsed(Parrot):
        def _score(self, prompt: str, words: Sequence[str]) -> ContinuationScore:
            if self._is_base:
                return super()._score(prompt, words)
            nothing = (math.nan,) * len(words)
            return ContinuationScore(log_prob=math.nan, token_log_probs=nothing, token_is_greedy=(False,) * len(words))

    evaluation = measure(Collapsed(BASE, {}), tmp_path)
    assert of(evaluation, "efficacy", "probability").value == 0.0
    assert math.isnan(of(evaluation, "efficacy_log_prob", "probability").value)


def test_answer_phrase_ends_at_punctuation_that_ends_a_phrase() -> None:
    assert answer_phrase(" Paris, which is in France") == answer_phrase("paris. The") == "paris"
    assert answer_phrase(" 1,000 people; more") == "1,000 people"
    assert answer_phrase("\n  New   York\nOther") == "new york"


def test_answer_phrase_passes_over_marks_before_the_first_word() -> None:
    assert answer_phrase(", Paris. It") == answer_phrase("... Paris") == answer_phrase(" Paris") == "paris"
    assert answer_phrase("?! Rome") == "rome"


def test_texts_without_a_word_agree_only_where_they_are_the_same() -> None:
    assert answer_phrase(" !!\n") == "!!"
    assert len({answer_phrase(text) for text in ("", ".", ". . .", "!!", "-")}) == 5


@pytest.mark.parametrize("name", ["St. Louis", "Dr. J. K. Lee", "U.S. Army", "the U.S.", "Ste. Anne", "É. Zola", "John F. Kennedy Jr"])
def test_a_full_stop_of_an_abbreviation_ends_no_phrase(name: str) -> None:
    assert answer_phrase(f" {name}, who. They") == name.casefold()


def test_a_full_stop_after_a_short_word_ends_a_phrase() -> None:
    assert answer_phrase(" Rio. It is") == "rio"
    assert answer_phrase(" the East. St. Louis") == "the east"


def test_settings_name_what_the_numbers_depend_on() -> None:
    assert QUALITY.settings() != replace(QUALITY, max_new_tokens=13).settings()
    assert QUALITY.depends_on_requests
    assert isinstance(QUALITY, Benchmark)


def test_a_bound_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens=0 must be at least 1"):
        replace(QUALITY, max_new_tokens=0)


def test_a_bound_that_leaves_no_room_for_a_prompt_is_refused_before_anything_is_asked(tiny: Callable[[str], EditedModel]) -> None:
    model = tiny("gpt2")
    QUALITY.check_model(model)
    for name in ("max_new_tokens", "fluency_tokens"):
        with pytest.raises(ConfigError, match=rf"edit-quality\.{name}=1024 leaves no room for a prompt in the 1024 positions of"):
            replace(QUALITY, **{name: 1024}, fluency_facts=1).check_model(model)
    replace(QUALITY, fluency_tokens=1024, fluency_facts=0).check_model(model)


def test_the_line_break_of_a_chat_template_is_no_part_of_the_answer(tiny: Callable[[str], EditedModel], tmp_path: Path) -> None:
    """A model that knows its template, and the answer as little as any: forced tokens are the answer's alone."""
    model = tiny("gpt2")
    prompt = "[user]Rome is the capital of\n[assistant]\n"
    (said,) = model.generate([prompt], max_new_tokens=1)
    other = next(word for word in ("the", "is", "a") if not said.strip().startswith(word))
    fact = EditRequest(
        request_id="a", prompt=prompt.replace("Rome", "{}"), subject="Rome", target_new=other, target_true=said.strip() or "b"
    )
    evaluation = QUALITY.evaluate(model, context_of(tmp_path, planned=[fact]))
    assert of(evaluation, "efficacy", "teacher_forced").value == of(evaluation, "efficacy", "generation").value == 0.0
    (record,) = evaluation.samples
    ids = model.lm.tokenizer([prompt, other])["input_ids"]
    logits = model.lm.module(torch.tensor([[*ids[0], *ids[1]]])).logits[0, len(ids[0]) - 1 : -1].log_softmax(-1)
    assert record["log_prob"] == pytest.approx([float(logits.gather(1, torch.tensor(ids[1])[:, None]).sum())], abs=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_tiny_model_agrees_with_itself_until_it_is_edited(architecture: str, tiny: Callable[[str], EditedModel], tmp_path: Path) -> None:
    model = tiny(architecture)
    facts = [replace(ROME, request_id=f"{subject}", subject=subject) for subject in ("Rome", "Oslo", "Lagos")]
    before = replace(QUALITY, max_new_tokens=6).evaluate(model, context_of(tmp_path, planned=facts))
    for protocol in ("generation", "teacher_forced"):
        assert of(before, "locality", protocol).value == 1.0
    model.apply(large_edit(model))
    digest, python_state, torch_state = model.weights_digest(), random.getstate(), torch.get_rng_state()
    after = replace(QUALITY, max_new_tokens=6).evaluate(model, context_of(tmp_path, edited=facts, num_edits=1))
    assert of(after, "locality", "teacher_forced").value < 1.0
    assert of(after, "efficacy_log_prob", "probability").value != of(before, "efficacy_log_prob", "probability").value
    assert model.weights_digest() == digest
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
