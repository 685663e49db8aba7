"""The questions of the quick benchmark: well formed, balanced, and apart from what is edited."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from editeval.benchmarks.harness_tasks import OUR_DATA
from editeval.datasets.facts import Facts
from editeval.datasets.text import contains_answer, normalize_answer

DATA = OUR_DATA / "quick"
SETS = ("world_knowledge", "arithmetic", "commonsense", "reading")
NUM_CHOICES = {"world_knowledge": {4}, "arithmetic": {4}, "commonsense": {2, 3, 4}, "reading": {4}}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def edited_subjects() -> set[str]:
    return {request.subject.removeprefix("the ") for request in Facts().load()}


def test_every_set_has_a_file_and_every_file_is_a_set() -> None:
    assert {path.stem for path in DATA.glob("*.jsonl")} == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_has_enough_items_that_the_template_can_render(name: str) -> None:
    items = rows(name)
    assert len(items) >= 64
    for number, item in enumerate(items, start=1):
        assert set(item) == {"id", "context", "choices", "answer"}
        assert item["id"] == f"{name}-{number:03d}"
        assert len(item["choices"]) in NUM_CHOICES[name]
        assert isinstance(item["answer"], int)
        assert 0 <= item["answer"] < len(item["choices"])
        # The harness puts one space between context and choice.
        for text in (item["context"], *item["choices"]):
            assert text
            assert text == text.strip()


@pytest.mark.parametrize("name", SETS)
def test_no_item_or_choice_occurs_twice(name: str) -> None:
    items = rows(name)
    assert len({normalize_answer(item["context"]) for item in items}) == len(items)
    for item in items:
        assert len({normalize_answer(choice) for choice in item["choices"]}) == len(item["choices"]), item["id"]


@pytest.mark.parametrize("name", SETS)
def test_always_guessing_one_position_scores_chance(name: str) -> None:
    items = rows(name)
    expected = sum(1 / len(item["choices"]) for item in items) / len(items)
    for position, count in Counter(item["answer"] for item in items).items():
        assert count / len(items) == pytest.approx(expected, abs=0.06), f"position {position}"


@pytest.mark.parametrize("name", SETS)
def test_always_guessing_the_longest_or_shortest_choice_is_no_strategy(name: str) -> None:
    items = [item for item in rows(name) if len({len(choice) for choice in item["choices"]}) == len(item["choices"])]
    for pick in (max, min):
        right = sum(pick(item["choices"], key=len) == item["choices"][item["answer"]] for item in items)
        assert right <= 0.6 * len(items), pick.__name__


def test_a_context_is_short_enough_to_be_asked_at_every_rung() -> None:
    lengths = [len(item["context"]) for name in SETS for item in rows(name)]
    assert max(lengths) < 400
    assert sum(lengths) < 30_000


def test_reading_answers_follow_from_their_passage() -> None:
    for item in rows("reading"):
        passage, question = item["context"].split("\nQuestion: ")
        assert question.endswith("\nAnswer:"), item["id"]
        assert passage.count(".") in range(2, 6), item["id"]


@pytest.mark.parametrize("name", SETS)
def test_no_question_mentions_a_subject_that_is_edited(name: str, edited_subjects: set[str]) -> None:
    for item in rows(name):
        text = " | ".join((item["context"], *item["choices"]))
        assert {subject for subject in edited_subjects if contains_answer(text, subject)} == set(), item["id"]


def test_passage_is_prose_of_some_pages_without_edited_subjects(edited_subjects: set[str]) -> None:
    text = Path(DATA / "passage.txt").read_text(encoding="utf-8")
    assert 1500 <= len(text.split()) <= 2500
    assert {subject for subject in edited_subjects if contains_answer(text, subject)} == set()
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    assert len(set(paragraphs)) == len(paragraphs)
