"""Folding a grid into jobs, without any launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editeval.sweep.plan import Axis, Defaults, Job, counts_of, fold, job_id, parse_list, split
from editeval.types import ConfigError

DEFAULTS = Defaults(num_edits=(1, 5, 10), benchmarks=("edit-quality", "quick"))


def defaults_for(overrides: Sequence[str]) -> Defaults:
    ladders = {"ladder=paper": (1, 5, 1000), "ladder=dense": (1, 2, 3)}
    return next((Defaults(num_edits=ladders[text], benchmarks=DEFAULTS.benchmarks) for text in overrides if text in ladders), DEFAULTS)


def axis(key: str, *values: str) -> Axis:
    return Axis(key=key, values=values)


def test_rungs_and_benchmarks_are_no_jobs_of_their_own() -> None:
    jobs = fold([axis("method", "rome", "memit"), axis("num_edits", "1", "100", "10"), axis("benchmark", "mmlu", "gsm8k")], defaults_for)
    assert [job.overrides for job in jobs] == [
        ("method=rome", "num_edits=[1,10,100]", "benchmark=[mmlu,gsm8k]"),
        ("method=memit", "num_edits=[1,10,100]", "benchmark=[mmlu,gsm8k]"),
    ]
    assert jobs[0].rungs == (0, 1, 10, 100)
    assert len(jobs[0].cells) == 8


def test_a_job_measures_the_defaults_where_nothing_is_said() -> None:
    (job,) = fold([axis("seed", "0")], defaults_for)
    assert job.rungs == (0, 1, 5, 10)
    assert job.benchmarks == ("edit-quality", "quick")


def test_swept_ladders_become_one_ladder() -> None:
    (job,) = fold([axis("ladder", "paper", "dense")], defaults_for)
    assert job.overrides == ("num_edits=[1,2,3,5,1000]",)


def test_lists_and_single_values_of_an_axis_are_united() -> None:
    (job,) = fold([axis("num_edits", "[1,10]", "5"), axis("benchmark", "[a,b]", "b", "c")], defaults_for)
    assert job.rungs == (0, 1, 5, 10)
    assert job.benchmarks == ("a", "b", "c")


def test_a_key_given_twice_counts_as_given_last() -> None:
    (job,) = fold([axis("seed", "0", "1"), axis("seed", "7")], defaults_for)
    assert "seed=7" in job.overrides


def test_the_same_sweep_again_has_the_same_jobs_in_whatever_order_it_is_written() -> None:
    axes = [axis("method", "rome", "memit"), axis("seed", "0", "1"), axis("num_edits", "1", "10")]
    assert {job.id for job in fold(axes, defaults_for)} == {job.id for job in fold(axes[::-1], defaults_for)}
    assert job_id(["seed=1", "method=rome", "hydra.launcher.timeout_min=3"]) == job_id(["method=rome", "seed=1"])


def test_jobs_of_one_trajectory_have_one_leader_and_leaders_come_first() -> None:
    axes = [axis("engine.batch_tokens", "64", "128"), axis("seed", "0", "1")]
    jobs = split(fold(axes, defaults_for), None)
    assert [job.leads for job in jobs] == [True, True, False, False]
    assert {job.trajectory for job in jobs if job.leads} == {job.trajectory for job in jobs if not job.leads}


def test_a_part_drops_the_settings_of_the_benchmarks_that_it_does_not_have() -> None:
    given_axes = [axis("benchmark", "a", "b"), axis("benchmark.b.limit", "3"), axis("num_edits", "1,2")]
    parts = split(fold(given_axes, defaults_for), 3)
    assert [part.overrides for part in parts] == [
        ("num_edits=[1,2]", "benchmark=[a]"),
        ("benchmark.b.limit=3", "num_edits=[1,2]", "benchmark=[b]"),
    ]
    assert [part.leads for part in parts] == [True, False]


counts = st.lists(st.integers(0, 2000), min_size=1, max_size=8)
names = st.lists(st.sampled_from(["mmlu", "gsm8k", "bbh", "quick", "edit-quality"]), min_size=1, max_size=5, unique=True)


@given(counts, names, st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), st.none() | st.integers(1, 40))
def test_folding_and_splitting_keep_every_cell_of_the_grid_exactly_once(
    rungs: list[int], benchmarks: list[str], seeds: list[int], max_cells: int | None
) -> None:
    axes = [axis("num_edits", *map(str, rungs)), axis("benchmark", *benchmarks), axis("seed", *map(str, seeds))]
    jobs = split(fold(axes, defaults_for), max_cells)
    cells = [(next(text for text in job.overrides if text.startswith("seed=")), *cell) for job in jobs for cell in job.cells]
    assert len(cells) == len(set(cells))
    assert set(cells) == set(itertools.product([f"seed={seed}" for seed in seeds], {0, *rungs}, benchmarks))
    if max_cells is not None:
        assert all(len(job.cells) <= max_cells or len(job.benchmarks) == 1 for job in jobs)
    assert sum(job.leads for job in jobs) == len(seeds)


@pytest.mark.parametrize("wrong", ["-1", "ten", "1.5"])
def test_a_rung_that_is_no_count_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="num_edits"):
        fold([axis("num_edits", wrong)], defaults_for)
    with pytest.raises(ConfigError, match="num_edits"):
        counts_of([1, wrong])


def test_no_benchmark_and_no_cells_are_refused() -> None:
    with pytest.raises(ConfigError, match="benchmark is empty"):
        fold([axis("benchmark", "[]")], defaults_for)
    with pytest.raises(ConfigError, match="max_cells_per_job=0"):
        split([Job(overrides=(), rungs=(0,), benchmarks=("a",))], 0)


def test_lists_are_read_with_quotes_and_spaces() -> None:
    assert parse_list(" [ 'a', \"b\" ,c] ") == ["a", "b", "c"]
