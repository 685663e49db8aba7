"""Which edit broke a model, and where two runs differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from editeval.build import build
from editeval.edits.delta import Edit, LowRankDelta
from editeval.edits.journal import EditJournal
from editeval.interfaces import ModelSource
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import append_edit, write_manifest
from editeval.sweep.bisect import find_breaking_edit
from editeval.sweep.diff import compare
from editeval.types import EditevalError, Evaluation, Measurement

EDITS = 9
KEY = "ab" * 32


@pytest.fixture(scope="module")
def config(compose_config: Callable[..., DictConfig]) -> DictConfig:
    return compose_config("debug=tiny")


def run_with(folder: Path, config: DictConfig, scales: Sequence[float]) -> Path:
    """Write a run whose edit k adds a random rank-one update of norm scales[k-1] to one matrix."""
    model = build(config.model, "model", ModelSource).load()
    manifest = {"edit_key": KEY, "model_fingerprint": model.fingerprint, "config": OmegaConf.to_container(config, resolve=True)}
    write_manifest(folder, manifest)
    parameter = f"{model.sites.mlp_out.format(1)}.weight"
    d_out, d_in = model.module.get_parameter(parameter).shape
    generator = torch.Generator().manual_seed(0)
    with EditJournal.open(folder / "journal", genesis=KEY) as journal:
        for number, scale in enumerate(scales, start=1):
            left, right = torch.randn(d_out, 1, generator=generator), torch.randn(1, d_in, generator=generator)
            delta = LowRankDelta(parameter=parameter, left=left / left.norm() * scale, right=right / right.norm())
            journal.append((f"fact-{number}",), Edit(deltas=(delta,)), 0.0)
    return folder


@pytest.mark.parametrize("guilty", [1, 4, 9])
def test_the_edit_that_broke_the_model_is_named_after_a_logarithm_of_looks(guilty: int, config: DictConfig, tmp_path: Path) -> None:
    run = run_with(tmp_path, config, [1e4 if step == guilty else 1e-3 for step in range(1, EDITS + 1)])
    found = find_breaking_edit(run, max_norm_ratio=3.0)
    assert found.step == guilty
    assert found.request_ids == (f"fact-{guilty}",)
    assert found.looked_at <= 1 + math.ceil(math.log2(EDITS))
    assert f"edit {guilty} of 9 (fact-{guilty}) brought a norm to" in found.sentence()


def test_a_model_within_the_limits_has_no_breaking_edit(config: DictConfig, tmp_path: Path) -> None:
    found = find_breaking_edit(run_with(tmp_path, config, [1e-3] * 3))
    assert found.step is None
    assert found.sentence().startswith("none of the 3 edits broke the model (max_canary_ratio=10)")
    assert "--max-norm-ratio 2" in found.sentence()


def test_a_limit_that_the_unedited_model_breaks_is_refused(config: DictConfig, tmp_path: Path) -> None:
    with pytest.raises(EditevalError, match=r"max_norm_ratio=0\.5 must be above 1"):
        find_breaking_edit(run_with(tmp_path, config, [1e-3]), max_norm_ratio=0.5)


def small_run(folder: Path, *, seed: int = 0, value: float = 0.5, digests: Sequence[str] = ("w1", "w2"), facts: str = "f") -> Path:
    config: dict[str, Any] = {"seed": seed, "method": {"name": "rome", "layer": 2}, "paths": {"runs": str(folder)}}
    write_manifest(folder, {"edit_key": KEY, "model_fingerprint": "m" * 64, "config": config, "packages": {"torch": "2"}})
    for step, digest in enumerate(digests, start=1):
        append_edit(folder, {"step": step, "request_ids": [f"{facts}{step}"], "weights_digest": digest, "seconds": 0.1, "diagnostics": {}})
    measured = Measurement(task="t", metric="accuracy", protocol="likelihood", value=value, n=4)
    ScoreStore(folder).record(
        Evaluation(measurements=(measured,)), benchmark="quick", benchmark_key="k", num_edits=2, state_digest="s", seconds=1.0
    )
    return folder


def test_runs_that_did_the_same_have_no_difference_wherever_they_lie(tmp_path: Path) -> None:
    assert compare(small_run(tmp_path / "a"), small_run(tmp_path / "b")) == ()
    assert compare(small_run(tmp_path / "c", value=math.nan), small_run(tmp_path / "d", value=math.nan)) == ()


def test_every_kind_of_difference_is_named(tmp_path: Path) -> None:
    first = small_run(tmp_path / "a")
    assert compare(first, small_run(tmp_path / "b", seed=1)) == ("seed: 0 | 1",)
    assert compare(first, small_run(tmp_path / "c", digests=("w1", "x2"))) == ("from edit 2 on the weights differ: w2 | x2",)
    assert compare(first, small_run(tmp_path / "d", facts="g")) == ("from edit 1 on other facts are edited: f1 | g1",)
    assert compare(first, small_run(tmp_path / "e", digests=("w1",))) == ("edits: 2 | 1",)
    assert compare(first, small_run(tmp_path / "f", value=0.25)) == ("quick/t.accuracy.likelihood after 2 edits: 0.5 | 0.25",)
