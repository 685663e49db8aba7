"""The seven benchmarks of the paper on a real model where there is no network at all: a namespace without a route."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from editeval.files import read_jsonl
from tests.benchmarks.conftest import smollm2_folder
from tests.conftest import REPOSITORY

SEVEN = ("mmlu-generative", "bbh", "gsm8k", "commonsense_qa-generative", "triviaqa", "truthfulqa", "toxigen")
WRITTEN = ("bbh", "gsm8k", "commonsense_qa-generative", "triviaqa", "mmlu-generative")
ONE_OF_MANY = {"mmlu-generative": "mmlu_anatomy_generative", "bbh": "bbh_cot_fewshot_boolean_expressions"}  # subjects are alike


def without_network(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of ours where no address can be reached."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture
def overrides(shared_data: Path, tmp_path: Path) -> list[str]:
    """A run of all seven on one or two items each; skipped where a network namespace or the model is not to be had."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("`unshare -rn` is not allowed here: no way to take the network away")
    model = smollm2_folder()
    # A cache of its own, in which nothing is but the model: no score that was measured before answers instead.
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(model.parent, target_is_directory=True)
    return [
        *("method=none", "num_edits=1", "dataset=counterfact", "benchmark=paper", f"paths.data={shared_data}"),
        *(f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}", "callback=silent", "logger=[]"),
        *(f"benchmark.{name}.limit=1" for name in SEVEN),
        *(f"benchmark.{name}.max_new_tokens=4" for name in WRITTEN),
        *(f"benchmark.{name}.task={task}" for name, task in ONE_OF_MANY.items()),
    ]


@pytest.mark.shared
@pytest.mark.slow
def test_the_seven_benchmarks_run_without_network(overrides: list[str], tmp_path: Path) -> None:
    asked = without_network(["-m", "editeval", "doctor", "--offline", *overrides])
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert asked.stdout.splitlines()[-1] == "ready"
    done = without_network(["launch.py", *overrides])
    assert done.returncode == 0, done.stdout + done.stderr
    (scores,) = (tmp_path / "runs").glob("*/scores.jsonl")
    measured = {row["benchmark"] for row in read_jsonl(scores)[0]}
    assert measured == set(SEVEN)


@pytest.mark.shared
def test_doctor_names_what_an_offline_run_lacks(overrides: list[str]) -> None:
    without = [setting for setting in overrides if not setting.startswith("paths.data=")]
    asked = without_network(["-m", "editeval", "doctor", "--offline", *without])
    assert asked.returncode != 0
    missing = [line for line in asked.stdout.splitlines() if line.startswith("missing")]
    assert any("dataset" in line or "counterfact" in line for line in missing)
    assert len(missing) >= len(SEVEN)
    assert asked.stdout.splitlines()[-1].startswith("NOT ready")
