"""What is said of a run on disk that is no longer whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.experiment import run
from editeval.models.tiny import TinyModel
from editeval.report.query import query
from editeval.revisit import export, load_edited, verify
from editeval.runner.run_files import read_manifest
from editeval.types import JournalError

Compose = Callable[..., DictConfig]

MEASURED = ("benchmark=[edit-quality]", "benchmark.edit-quality.max_new_tokens=2", "benchmark.edit-quality.fluency_tokens=3")


@pytest.fixture(scope="module")
def configured(compose_config: Compose) -> Callable[[Path], DictConfig]:
    """A run of four edits, measured after two and after all."""
    fixed = ("debug=tiny", "model=tiny-gpt2", "method=ft-l", "method.num_steps=1", "num_edits=[2,4]", "callback=silent", "logger=[]")
    return lambda runs: compose_config(*fixed, *MEASURED, f"paths.runs={runs}")


@pytest.fixture(scope="module")
def finished(configured: Callable[[Path], DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(configured(tmp_path_factory.mktemp("runs"))).run_dir


def without_edits(finished: Path, folder: Path, *, keep: float) -> Path:
    """A copy of a run whose journal lost its last bytes."""
    copy = folder / finished.name
    shutil.copytree(finished, copy)
    (segment,) = (copy / "journal").iterdir()
    segment.write_bytes(segment.read_bytes()[: int(keep * segment.stat().st_size)])
    return copy


@pytest.mark.parametrize(("keep", "left"), [(0.7, "2 edits"), (0.0, "0 edits")])
def test_a_run_that_lost_edits_is_neither_verified_nor_exported_and_a_relaunch_mends_it(
    finished: Path, configured: Callable[[Path], DictConfig], tmp_path: Path, keep: float, left: str
) -> None:
    assert verify(finished).passed
    lacking = without_edits(finished, tmp_path, keep=keep)
    found = verify(lacking)
    (difference,) = found.differences
    assert difference.startswith(f"the journal holds {left}, but edits.jsonl logs 4 and scores.jsonl measured 4; start ")
    assert not found.passed
    with pytest.raises(JournalError, match=f"holds {left}, but edits.jsonl logs 4"):
        export(lacking, tmp_path / "exported")
    assert run(configured(tmp_path)).run_dir == lacking
    assert verify(lacking).passed
    assert load_edited(lacking).num_applied == 4


def test_weights_of_ones_own_under_a_built_in_models_settings_are_told_by_their_own_name(
    compose_config: Compose, cache_dir: Path, tmp_path: Path
) -> None:
    lm = TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()
    lm.module.save_pretrained(tmp_path / "mine")
    lm.tokenizer.save_pretrained(tmp_path / "mine")
    model = ("model=smollm2-135m", f"model.name_or_path={tmp_path / 'mine'}")
    what = ("method=none", "num_edits=1", "dataset.known_only=false", "benchmark=[perplexity]", "callback=silent", "logger=[]")
    folder = run(compose_config(*model, *what, f"paths.runs={tmp_path / 'runs'}")).run_dir
    assert folder.name.startswith("mine-none-facts-")
    assert read_manifest(folder)["config"]["model"]["name"] == "mine"
    assert query([folder], "SELECT DISTINCT model FROM scores").rows == (("mine",),)
    assert verify(folder).passed
