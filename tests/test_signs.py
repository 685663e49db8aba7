"""The cheap signs of a broken model in a run's edit log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.experiment import run
from editeval.runner.run_files import read_edits


def edits_of(compose_config: Callable[..., DictConfig], folder: Path, *overrides: str) -> list[dict[str, float]]:
    quick = ("debug=tiny", "num_edits=[1,3]", "benchmark=[perplexity]", "callback=silent", "logger=[]", f"paths.runs={folder}")
    return [dict(row) for row in read_edits(run(compose_config(*quick, *overrides)).run_dir)]


def test_every_edit_has_the_norm_of_its_weights_and_every_rung_the_canary(
    compose_config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    untouched = edits_of(compose_config, tmp_path, "method=none")
    assert [row.get("canary_ratio") for row in untouched] == [1.0, None, 1.0]
    assert [row["weight_norm_ratio"] for row in untouched] == [1.0, 1.0, 1.0]

    shaken = edits_of(compose_config, tmp_path, "method=random")
    assert [("canary_ratio" in row) for row in shaken] == [True, False, True]
    assert all(row["weight_norm_ratio"] != 1 for row in shaken)
    assert abs(shaken[2]["canary_ratio"] - 1) > 1e-4, "the edited model reads the sentences, not the unedited one"


def test_a_memory_beside_the_model_leaves_plain_sentences_alone(compose_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    rows = edits_of(compose_config, tmp_path, "method=grace")
    assert [row.get("canary_ratio") for row in rows] == [pytest.approx(1.0, abs=1e-6), None, pytest.approx(1.0, abs=1e-6)]
