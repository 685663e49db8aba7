"""Intervals of shares against the truth that was drawn from, near the ends above all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from editeval.report.intervals import normal_quantile, score_interval, share_interval, wilson
from editeval.types import Score


def score(value: float, *, n: int, stderr: float | None) -> Score:
    names = {"benchmark": "gsm8k", "task": "gsm8k", "metric": "acc", "protocol": "generative", "benchmark_key": "k", "state_digest": "d"}
    return Score(**names, value=value, n=n, num_edits=1, seconds=0.0, stderr=stderr)


@pytest.mark.parametrize("truth", [0.01, 0.05, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [20, 200])
def test_a_share_lies_in_its_interval_nineteen_times_of_twenty(truth: float, n: int) -> None:
    rights = np.random.default_rng(7).binomial(n, truth, 4000)
    held = 0
    for right in rights:
        share = right / n
        found = score_interval(score(share, n=n, stderr=float(np.sqrt(share * (1 - share) / (n - 1)))), is_share=True)
        held += found.low <= truth <= found.high
    # Wilson's coverage oscillates with n and the share; value +- 1.96 standard errors holds 0.01 of 20 in 18% of the draws.
    assert held / len(rights) >= 0.91


def test_graded_items_have_shorter_intervals_than_right_and_wrong_ones() -> None:
    graded, plain = (share_interval(0.4, variance=variance, n=100) for variance in (0.02 / 100, 0.24 / 100))
    assert plain == wilson(40, 100)
    assert graded.high - graded.low < 0.35 * (plain.high - plain.low)


@given(share=st.floats(0, 1), n=st.integers(1, 5000), spread=st.floats(0, 1))
def test_an_interval_holds_its_share_and_stays_between_nothing_and_all(share: float, n: int, spread: float) -> None:
    found = share_interval(share, variance=spread * share * (1 - share) / n, n=n)
    assert 0 <= found.low <= found.value == share <= found.high <= 1


def test_what_is_no_share_has_its_standard_errors_and_what_has_none_is_alone() -> None:
    assert score_interval(score(30.0, n=50, stderr=2.0), is_share=False).high == pytest.approx(30 + 2 * normal_quantile())
    for stderr in (None, float("nan")):
        found = score_interval(score(30.0, n=20, stderr=stderr), is_share=False)
        assert found.low == found.value == found.high == 30


@pytest.mark.parametrize("stderr", [None, float("nan")])
def test_a_share_without_an_error_of_its_own_has_that_of_right_and_wrong_answers(stderr: float | None) -> None:
    for share, n in ((0.0, 20), (0.25, 57)):
        found, plain = score_interval(score(share, n=n, stderr=stderr), is_share=True), wilson(share * n, n)
        assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    broken = score_interval(score(float("nan"), n=20, stderr=stderr), is_share=True)
    assert broken.low != broken.low  # no number
