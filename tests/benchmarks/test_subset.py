"""Subsets: proportional, nested, fixed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from editeval.benchmarks.subset import MAX_STRATA, stratified_subset

LABELS = ["a"] * 40 + ["b"] * 20 + ["c"] * 40


def test_every_label_keeps_its_share() -> None:
    chosen = stratified_subset(LABELS, 10, seed=0, name="task")
    assert Counter(LABELS[index] for index in chosen) == {"a": 4, "b": 2, "c": 4}


def test_choice_depends_on_seed_and_task_alone() -> None:
    chosen = stratified_subset(LABELS, 10, seed=0, name="task")
    assert stratified_subset(LABELS, 10, seed=0, name="task") == chosen
    assert stratified_subset(LABELS, 10, seed=1, name="task") != chosen
    assert stratified_subset(LABELS, 10, seed=0, name="other") != chosen
    assert chosen != list(range(10))


def test_answers_that_are_no_classes_are_drawn_at_random() -> None:
    labels = [str(index) for index in range(MAX_STRATA + 30)]
    chosen = stratified_subset(labels, 7, seed=0, name="task")
    assert len(set(chosen)) == 7
    assert chosen != list(range(7))


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(1, 60), st.integers(1, 60))
def test_smaller_subsets_are_part_of_larger_ones(labels: list[str], one: int, two: int) -> None:
    small, large = sorted((one, two))
    inner, outer = (stratified_subset(labels, size, seed=3, name="task") for size in (small, large))
    assert set(inner) <= set(outer)
    assert len(inner) == min(small, len(labels))
    assert inner == sorted(inner)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(1, 60))
def test_no_label_is_off_its_share_by_more_than_one(labels: list[str], size: int) -> None:
    chosen = Counter(labels[index] for index in stratified_subset(labels, size, seed=3, name="task"))
    for label, total in Counter(labels).items():
        assert abs(chosen[label] - min(size, len(labels)) * total / len(labels)) <= 1.0 + 1e-9
