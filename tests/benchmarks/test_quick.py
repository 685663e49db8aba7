"""The quick benchmark: four tasks and a passage, all within the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from editeval.benchmarks.quick import QuickBenchmark
from editeval.inference.edited import EditedModel
from tests.benchmarks.conftest import context_of, large_edit

TASKS = {"all", "world_knowledge", "arithmetic", "commonsense", "reading"}


def test_measures_four_tasks_their_mean_and_a_passage(tiny: Callable[[str], EditedModel], tmp_path: Path) -> None:
    benchmark = QuickBenchmark(limit=3, max_characters=600, seed=0)
    benchmark.check()
    evaluation = benchmark.evaluate(tiny("gpt2"), context_of(tmp_path))
    accuracies = {found.task: found for found in evaluation.measurements if found.metric == "acc_norm"}
    assert set(accuracies) == TASKS
    assert accuracies["all"].n == 12
    assert all(found.n == 3 for task, found in accuracies.items() if task != "all")
    assert all(found.chance is not None and 0 < found.chance < 1 and found.protocol == "cloze" for found in accuracies.values())
    passage = {found.metric for found in evaluation.measurements if found.task == "passage"}
    assert passage == {"bits_per_token", "perplexity", "bits_per_byte"}
    assert evaluation.measurements[0].metric == "acc_norm"
    assert evaluation.measurements[0].task == "all"


def test_shows_a_damaged_model(tiny: Callable[[str], EditedModel], tmp_path: Path) -> None:
    model, benchmark = tiny("llama"), QuickBenchmark(limit=3, max_characters=600, seed=0)
    before = benchmark.evaluate(model, context_of(tmp_path))
    model.apply(large_edit(model))
    after = benchmark.evaluate(model, context_of(tmp_path))
    values = [{(found.task, found.metric): found.value for found in run.measurements} for run in (before, after)]
    assert values[0]["all", "gold_probability"] != values[1]["all", "gold_probability"]
    assert values[0]["passage", "bits_per_token"] != values[1]["passage", "bits_per_token"]


def test_settings_follow_the_limit() -> None:
    whole, part = (QuickBenchmark(limit=limit, max_characters=None, seed=0) for limit in (None, 3))
    assert whole.settings() != part.settings()
    assert whole.settings() == QuickBenchmark(limit=None, max_characters=None, seed=0).settings()
