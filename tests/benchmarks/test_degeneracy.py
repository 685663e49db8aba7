"""What stands beside an accuracy: degenerate text, balanced accuracy, one answer to everything."""

from __future__ import annotations

import math

import pytest

from editeval.benchmarks.degeneracy import (
    Answered,
    balanced,
    degenerate_reasons,
    is_unended,
    plain_answer,
    repeated_share,
    top_answer_share,
)


def answered(right: str, given: str) -> Answered:
    return Answered(right=right, given=given, score=float(right == given))


def test_empty_repeating_and_unended_texts_are_told_apart() -> None:
    assert degenerate_reasons(" \n", []) == ("empty",)
    assert degenerate_reasons("the the", ["the"] * 12) == ("repeats",)
    assert degenerate_reasons("a good answer", list(range(20))) == ()
    assert is_unended(list(range(20)), max_new_tokens=20)
    assert not is_unended(list(range(12)), max_new_tokens=20)


def test_a_short_text_is_not_judged_for_repetition() -> None:
    assert repeated_share([1] * 10) == 0.0
    assert repeated_share([1] * 11) == pytest.approx(1 - 1 / 8)
    assert repeated_share([]) == 0.0


def test_a_constant_answer_scores_one_over_the_classes_whatever_their_sizes() -> None:
    items = [answered("yes", "no")] * 2 + [answered("no", "no")] * 8
    assert balanced(items) == (0.5, 0.0)
    assert top_answer_share(items) == 1.0


def test_balanced_error_is_that_of_the_mean_of_class_means() -> None:
    items = [answered("a", "a"), answered("a", "b"), answered("b", "b"), answered("b", "b")]
    mean, stderr = balanced(items)
    assert mean == 0.75
    assert stderr == pytest.approx(math.sqrt(0.5 / 2) / 2)
    assert balanced(items[1:])[1] is None  # one item of class a tells no spread


def test_an_answer_is_compared_without_the_marks_around_it() -> None:
    assert plain_answer(" (B). ") == plain_answer("b") == "b"
    assert plain_answer("MM/DD") == "mm/dd"
