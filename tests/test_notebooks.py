"""The notebooks run, define nothing, and are stored without output."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.report.synthetic import Planted, PlantedRun, falls_at, write_run

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads((FOLDER / name).read_text())["cells"] if cell["cell_type"] == "code"]


def source(name: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in code_cells(name))


@pytest.fixture
def environment(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for method in ("rome", "memit", "none"):
        write_run(tmp_path / "runs", PlantedRun(method=method, benchmarks=(Planted(name="mmlu", kept=falls_at(20)),)))
    monkeypatch.setenv("EDITEVAL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("EDITEVAL_CACHE", str(cache_dir))
    monkeypatch.setenv("EDITEVAL_NOTEBOOK_MODEL", "tiny-llama")
    monkeypatch.chdir(FOLDER)
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def test_there_are_three_notebooks() -> None:
    assert NOTEBOOKS == ["01_one_edit.ipynb", "02_read_results.ipynb", "03_five_questions.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name: str, environment: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source(name), name, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    expected = {"01": "restored: True", "02": "3 runs", "03": "F4.1a"}
    assert expected[name[:2]] in said


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_defines_nothing_and_keeps_no_output(name: str) -> None:
    defined = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
    assert not defined
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(name))
