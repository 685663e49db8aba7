"""Which program did a job: what changes its digest, and what may be imported to plan and list jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from editeval.sweep import source
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    "name",
    [
        "conf/config.yaml",
        "editeval/types.py",
        "editeval/datasets/facts.yaml",
        "editeval/benchmarks/tasks/quick/_template_yaml",
        "editeval/benchmarks/data/quick/reading.jsonl",
        "editeval/benchmarks/data/quick/passage.txt",
        "hydra_plugins/editeval_sweeper/sweeper.py",
    ],
)
def test_a_changed_file_that_results_depend_on_is_another_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (REPOSITORY / name).is_file()
    monkeypatch.setattr(source, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("before")
    before = source.program_digest()
    path.write_text("after")
    assert source.program_digest() != before


@pytest.mark.parametrize("name", ["plan", "records", "status", "session", "source"])
def test_jobs_are_planned_and_listed_without_torch(name: str) -> None:
    code = f"import sys, editeval.sweep.{name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
