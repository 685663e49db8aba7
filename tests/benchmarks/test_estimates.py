"""Means and their errors."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from editeval.benchmarks.estimates import bootstrap_stderr, mean_and_stderr


def test_error_is_the_sample_deviation_over_root_n() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    mean, error = mean_and_stderr(values)
    assert mean == fmean(values)
    assert error == pytest.approx(stdev(values) / 2)


def test_one_value_has_no_error_and_none_no_mean() -> None:
    assert mean_and_stderr([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="at least one value"):
        mean_and_stderr([])


def test_what_is_not_finite_is_shown() -> None:
    mean, error = mean_and_stderr([1.0, math.nan])
    assert math.isnan(mean)
    assert error is not None
    assert math.isnan(error)
    assert mean_and_stderr([1.0, -math.inf])[0] == -math.inf


def test_bootstrap_error_of_a_mean_is_near_the_closed_form_and_repeats() -> None:
    generator = random.Random(0)
    values = [generator.random() for _ in range(200)]
    error = bootstrap_stderr(fmean, values, 1000)
    assert error == bootstrap_stderr(fmean, values, 1000)
    assert error == pytest.approx(mean_and_stderr(values)[1], rel=0.1)
