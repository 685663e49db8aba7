"""Whole runs of methods whose edits stand beside the weights: killed, continued, verified, reloaded, exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.benchmarks.quick import QuickBenchmark
from editeval.edits.delta_files import load_deltas
from editeval.experiment import RunResult, run
from editeval.files import read_jsonl
from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EvaluationContext, RunState
from editeval.revisit import export, load_edited, load_exported, verify
from editeval.types import EditevalError, EditRequest, Evaluation

METHODS = ("grace", "ike", "serac", "wise")
PROMPTS = ["The capital of France is", "The mother tongue of Danielle Darrieux is", "Yes"]
Configured = Callable[..., DictConfig]


class KilledError(Exception):
    """Stands for a kill: nothing after it runs."""


class KillAt(Callback):
    """Dies when the given edit begins."""

    def __init__(self, edit: int) -> None:
        self.left = edit

    def on_edit_start(self, state: RunState, requests: Sequence[EditRequest]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KilledError


@pytest.fixture
def configured(compose_config: Callable[..., DictConfig]) -> Configured:
    def compose(method: str, runs: Path) -> DictConfig:
        fixed = ("debug=tiny", "model=tiny-gpt2", "num_edits=[1,3]", "callback=silent", "logger=[]", "engine.packed_gib=0.5")
        measured = ("benchmark=[edit-quality]", "benchmark.edit-quality.max_new_tokens=3")
        return compose_config(*fixed, *measured, f"method={method}", f"paths.runs={runs}")

    return compose


def numbers(result: RunResult) -> list[tuple[object, ...]]:
    return [(score.num_edits, score.name, repr(score.value), score.state_digest) for score in result.scores]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_replays_its_adapter_and_ends_like_an_unbroken_one(configured: Configured, tmp_path: Path, method: str) -> None:
    unbroken = run(configured(method, tmp_path / "unbroken"))
    with pytest.raises(KilledError):
        run(configured(method, tmp_path / "killed"), KillAt(3))
    resumed = run(configured(method, tmp_path / "killed"))
    assert numbers(resumed) == numbers(unbroken)
    assert resumed.final_digest == unbroken.final_digest
    logged = [row["weights_digest"] for row in read_jsonl(unbroken.run_dir / "edits.jsonl")[0]]
    assert len(set(logged)) == 3
    assert verify(resumed.run_dir).passed
    model = load_edited(resumed.run_dir)
    assert model.weights_digest() == logged[-1]
    assert load_edited(resumed.run_dir, num_edits=1).weights_digest() == logged[0]

    folder = export(resumed.run_dir, tmp_path / "exported")
    again = load_exported(folder)
    assert again.lm.packed._most_bytes == model.lm.packed._most_bytes == 2**29
    assert again.generate(PROMPTS, max_new_tokens=5) == model.generate(PROMPTS, max_new_tokens=5)
    assert again.score(PROMPTS, [" Rome"] * 3) == model.score(PROMPTS, [" Rome"] * 3)


def test_edits_that_change_nothing_have_the_unedited_models_scores_without_asking_again(
    compose_config: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    measure = QuickBenchmark.evaluate

    def counted(benchmark: QuickBenchmark, model: EditedModel, context: EvaluationContext) -> Evaluation:
        asked.append(context.num_edits)
        return measure(benchmark, model, context)

    monkeypatch.setattr(QuickBenchmark, "evaluate", counted)
    fixed = ("debug=tiny", "num_edits=[1,3]", "callback=silent", "logger=[]", "benchmark=[quick]", f"paths.runs={tmp_path}")
    control = run(compose_config(*fixed, "method=none", f"paths.cache={tmp_path}"))
    assert asked == [0]
    values = {rung: [score.value for score in control.scores if score.num_edits == rung] for rung in (0, 1, 3)}
    assert values[0] == values[1] == values[3] != []
    run(compose_config(*fixed, "method=grace", f"paths.cache={tmp_path}"))
    assert asked == [0, 1, 3]  # a codebook that holds something may act


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditevalError, match=r"holds no editeval\.json"):
        load_exported(tmp_path)
    (tmp_path / "adapter.json").write_text("[{}]")
    with pytest.raises(EditevalError, match="export again"):
        load_deltas(tmp_path / "adapter")
