"""Single items: the question and the chosen answer in words, as far as the samples hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from editeval.report.changed import Answered, changed_items
from editeval.report.items import identity
from editeval.report.study import read_study, studies
from tests.report.synthetic import Planted, PlantedRun, keeps, write_run

QUESTION = {"question": "Which city is in Kenya?\nAnswer:", "choices": ["Rome", " Nairobi "], "right": 1}


def record(*, picked: int, target: int = 1, **more: Any) -> dict[str, Any]:
    said = {"metrics": {"acc": float(picked == target)}, "log_probs": [-1.0 if place == picked else -2.0 for place in range(2)]}
    return {"task": "cities", "item": 3, "filter": "none", "target": target, **said, **more}


def changed(before: dict[str, Any], after: dict[str, Any]) -> Answered:
    (found,) = changed_items("towns", {identity(before): before}, [after])
    return found


def test_an_item_tells_its_question_its_choices_and_which_were_chosen() -> None:
    assert changed(record(picked=1, **QUESTION), record(picked=0)) == Answered(
        benchmark="towns",
        name="cities, item 3",
        question="Which city is in Kenya?\nAnswer:\n– Rome\n– Nairobi",
        expected="Nairobi",
        before="Nairobi",
        after="Rome",
        passed_before=True,
        passed_after=False,
    )


def test_choices_that_the_question_lists_are_not_listed_again() -> None:
    lettered = {"question": "Which?\nA. Rome\nB. Nairobi\nAnswer:", "choices": ["A", "B"], "right": 1}
    found = changed(record(picked=1, **lettered), record(picked=0))
    assert found.question == lettered["question"]
    assert (found.expected, found.after) == ("B", "A")


def test_an_item_that_was_kept_without_its_question_has_its_name_and_the_place_of_the_choice() -> None:
    found = changed(record(picked=1), record(picked=0))
    assert (found.name, found.question) == ("cities, item 3", "")
    assert (found.expected, found.before, found.after) == ("1", "choice 1", "choice 0")


def test_what_has_several_right_choices_shows_its_target() -> None:
    several = {"question": "Which?", "choices": ["Rome", "Nairobi"], "right": None}
    assert changed(record(picked=1, **several), record(picked=0)).expected == "1"


def test_a_written_answer_is_shown_as_it_was_written() -> None:
    about = {"task": "sums", "item": 0, "filter": "none", "target": "4"}
    before = {**about, "question": "2 + 2 =", "generated": " 4", "metrics": {"exact_match": 1.0}}
    after = {**about, "generated": " five\n", "metrics": {"exact_match": 0.0}}
    found = changed(before, after)
    assert (found.question, found.expected, found.before, found.after) == ("2 + 2 =", "4", "4", "five")


def test_a_run_reads_the_questions_of_its_unedited_model(tmp_path: Path) -> None:
    planted = Planted(name="mmlu", kept=keeps(0.0))
    (run,) = read_study([write_run(tmp_path / "a", PlantedRun(rungs=(1,), benchmarks=(planted,)))], studies())
    items = [item for item in run.changed if item.benchmark == "mmlu"]
    assert items
    assert all(item.question.startswith("Question ") and "– town 2" in item.question for item in items)
    assert all(item.after.startswith("town ") for item in items)
    without = replace(planted, question_words=0)
    (run,) = read_study([write_run(tmp_path / "b", PlantedRun(rungs=(1,), benchmarks=(without,)))], studies())
    assert {item.question for item in run.changed if item.benchmark == "mmlu"} == {""}
