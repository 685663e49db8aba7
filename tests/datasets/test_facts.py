"""The built-in editing set: what every fact must be, and that its expansion never changes by accident."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from editeval.datasets.facts import BUILT_IN, MIN_NEIGHBORS, Facts, Relation, read_relations
from editeval.datasets.text import contains_answer, normalize_answer
from editeval.interfaces import EditDataset
from editeval.types import ConfigError, DatasetError, EditRequest, content_key

# Of all expanded rows, in order. Whoever changes a fact, a template or a rule of choice changes which edits every run
# makes: do it on purpose, note it in CHANGELOG.md, and put the new hash here.
WHOLE_SET = "3966e78d51cefd726ada184be20e8e7bf6032f98548e62d2a642c09390a64709"

SMALL = """
capital:
  prompt: "The capital of {} is"
  paraphrases: ["In {}, the capital is", "The government of {} sits in"]
  portability:
    - prompt: "The river through the capital of {} is the"
      answers: {Vienna: Danube, Budapest: Danube, Rome: Tiber, Paris: Seine}
  pairs: {Austria: Vienna, Hungary: Budapest, Italy: Rome, France: Paris, Spain: Madrid}
"""


@pytest.fixture(scope="module")
def requests() -> tuple[EditRequest, ...]:
    return Facts().load()


@pytest.fixture(scope="module")
def relations() -> dict[str, Relation]:
    return {relation.name: relation for relation in read_relations(BUILT_IN)}


def written(folder: Path, text: str) -> Facts:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return Facts(file=str(path))


def relation_of(request: EditRequest) -> str:
    return request.request_id.split("/")[0]


def test_is_an_edit_dataset_that_can_be_checked() -> None:
    facts = Facts()
    assert isinstance(facts, EditDataset)
    assert facts.known_only
    facts.check()


def test_has_many_facts_of_many_relations(requests: tuple[EditRequest, ...], relations: dict[str, Relation]) -> None:
    assert len(requests) >= 330
    assert len(relations) >= 15
    counts = Counter(relation_of(request) for request in requests)
    assert set(counts) == set(relations)
    assert min(counts.values()) >= 12
    assert sum(bool(request.portability) for request in requests) >= 150


def test_expansion_is_the_same_on_every_machine(requests: tuple[EditRequest, ...]) -> None:
    assert content_key([request.source_hash for request in requests]) == WHOLE_SET


def test_ids_say_what_the_fact_is_about(requests: tuple[EditRequest, ...]) -> None:
    france = next(request for request in requests if request.request_id == "capital/france")
    assert (france.subject, france.target_true) == ("France", "Paris")
    assert len({request.request_id for request in requests}) == len(requests)
    assert all(request.request_id.isascii() and " " not in request.request_id for request in requests)


def test_no_two_facts_are_about_the_same_subject(requests: tuple[EditRequest, ...]) -> None:
    subjects = Counter(normalize_answer(request.subject) for request in requests)
    assert [subject for subject, count in subjects.items() if count > 1] == []


def test_the_new_target_is_another_object_of_the_relation(requests: tuple[EditRequest, ...], relations: dict[str, Relation]) -> None:
    for request in requests:
        relation = relations[relation_of(request)]
        assert request.target_true == relation.pairs[request.subject]
        assert request.target_new in relation.pairs.values()
        first_words = [normalize_answer(target).split()[0] for target in (request.target_true, request.target_new)]
        assert first_words[0] != first_words[1], request
        assert request.target_new not in relation.also_true.get(request.subject, ()), request


def test_new_targets_are_spread_over_the_objects(requests: tuple[EditRequest, ...]) -> None:
    for name in {relation_of(request) for request in requests}:
        targets = Counter(request.target_new for request in requests if relation_of(request) == name)
        assert len(targets) >= 4, f"{name}: {targets}"


def test_every_prompt_is_about_its_subject_and_gives_nothing_away(requests: tuple[EditRequest, ...]) -> None:
    for request in requests:
        assert len(set(request.paraphrase_prompts)) >= 2
        prompts = (request.full_prompt, *request.paraphrase_prompts)
        assert len(set(prompts)) == len(prompts), request.request_id
        for prompt in (*prompts, *(probe.prompt for probe in request.portability)):
            assert request.subject in prompt
            assert "{" not in prompt
            assert prompt == prompt.strip()
            assert prompt[0] == '"' or prompt[0] == prompt[0].upper(), f"{prompt!r} begins in lower case"
            assert not contains_answer(prompt, request.target_new), prompt
            assert not contains_answer(prompt, str(request.target_true)), prompt


def test_neighbors_are_other_subjects_with_their_own_true_answers(
    requests: tuple[EditRequest, ...], relations: dict[str, Relation]
) -> None:
    for request in requests:
        relation = relations[relation_of(request)]
        answers = {relation.prompt.replace("{}", subject): answer for subject, answer in relation.pairs.items()}
        assert len({probe.prompt for probe in request.neighborhood_prompts}) == len(request.neighborhood_prompts) >= MIN_NEIGHBORS
        for probe in request.neighborhood_prompts:
            assert not contains_answer(probe.prompt, request.subject), request.request_id
            assert probe.answer == answers[probe.prompt]
            assert probe.answer != request.target_new, request.request_id


def test_portability_answers_follow_from_the_new_target_alone(requests: tuple[EditRequest, ...], relations: dict[str, Relation]) -> None:
    for request in requests:
        tables = {
            question.prompt.replace("{}", request.subject): question.answers for question in relations[relation_of(request)].portability
        }
        assert len(request.portability) <= 1
        for probe in request.portability:
            answers = tables[probe.prompt]
            assert probe.answer == answers[request.target_new]
            assert answers[str(request.target_true)] != probe.answer, f"{request.request_id}: the unedited model is right as well"


def test_portability_tables_name_only_objects_that_exist(relations: dict[str, Relation]) -> None:
    known = {answer for relation in relations.values() for answer in relation.pairs.values()}
    strangers = {
        f"{relation.name}: {sorted(set(question.answers) - known)}"
        for relation in relations.values()
        for question in relation.portability
        if not set(question.answers) <= known
    }
    assert strangers == set()


def test_every_portability_question_is_asked_of_some_fact(requests: tuple[EditRequest, ...], relations: dict[str, Relation]) -> None:
    asked = {probe.prompt for request in requests for probe in request.portability}
    for relation in relations.values():
        for question in relation.portability:
            assert asked & {question.prompt.replace("{}", subject) for subject in relation.pairs}, f"nobody is asked {question.prompt!r}"


def test_adding_a_pair_moves_no_other_pairs_choice_unless_it_is_chosen(tmp_path: Path) -> None:
    before = {request.subject: request for request in written(tmp_path, SMALL).load()}
    after = {request.subject: request for request in written(tmp_path, SMALL.replace("Spain: Madrid", "Spain: Madrid, Peru: Lima")).load()}
    for subject, request in before.items():
        assert after[subject].target_new in (request.target_new, "Lima")
        assert {probe.answer for probe in after[subject].neighborhood_prompts} <= {
            probe.answer for probe in request.neighborhood_prompts
        } | {
            "Lima",
            request.target_new,
        }


def test_portability_is_left_out_where_the_answer_would_not_change(tmp_path: Path) -> None:
    same = SMALL.replace("Rome: Tiber, Paris: Seine", "Rome: Danube, Paris: Danube, Madrid: Danube")
    assert all(not request.portability for request in written(tmp_path, same).load())
    assert any(request.portability for request in written(tmp_path, SMALL).load())


def test_what_would_be_true_as_well_is_never_the_counterfactual(tmp_path: Path) -> None:
    others = "  also_true: {Austria: [Budapest, Rome, Madrid]}\n  pairs:"
    requests = {request.subject: request for request in written(tmp_path, SMALL.replace("  pairs:", others)).load()}
    assert requests["Austria"].target_new == "Paris"


def test_objects_that_begin_alike_are_never_exchanged(tmp_path: Path) -> None:
    pairs = "{Austria: New York, Hungary: New Delhi, Italy: new Orleans, France: Paris, Spain: New Haven}"
    requests = {request.subject: request for request in written(tmp_path, SMALL.split("  pairs:")[0] + f"  pairs: {pairs}\n").load()}
    assert requests["Austria"].target_new == requests["Italy"].target_new == "Paris"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Spain: Madrid", "Spain: Madrid, Austria: Graz"), "'Austria' occurs twice"),
        (("Spain: Madrid", "Spain: Madrid, austria: Graz"), "the subject occurs already in capital/austria"),
        (("Spain: Madrid", 'Spain: " "'), r"capital\.pairs\.Spain is empty"),
        (("The capital of {} is", "The capital is"), "holds 0 placeholders '{}'; exactly one"),
        (('"In {}, the capital is", ', ""), "capital/austria has 1 paraphrases; at least 2"),
        (("Italy: Rome, France: Paris, Spain: Madrid", "Italy: Rome"), "capital/austria has 2 neighbours; at least 3"),
        (("sits in", "sits in Madrid, not in"), "gives the answer 'Madrid' away"),
        (("paraphrases", "paraphrase"), r"field capital\.paraphrase is unknown"),
        (("  pairs:", "  also_true: {Peru: [Lima]}\n  pairs:"), "also_true names 'Peru', which is no subject of capital"),
        (("capital:", "capital: ["), "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SMALL
    with pytest.raises(DatasetError, match=message):
        written(tmp_path, SMALL.replace(*change)).load()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read"):
        Facts(file=str(tmp_path / "none.yaml")).check()


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(SMALL.replace("Spain: Madrid", "Spain: Madrid, austria: Graz"), encoding="utf-8")
    rows = Facts(file=str(path), on_bad_row="skip").read()
    assert len(rows.requests) == 5
    assert [note.number for note in rows.skipped] == [6]


def test_an_unknown_way_with_bad_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="on_bad_row=drop is unknown; one of: error, skip"):
        Facts(on_bad_row="drop")
