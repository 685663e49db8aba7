"""Thousands of cells, a thousand runs: what planning, looking and asking tell stays whole (how fast they are is in BENCHMARKS.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from editeval.report.query import query
from editeval.sweep.show import show_status
from tests.sweep.commands import Program
from tests.sweep.many import BENCHMARKS, METRICS, RUNS, write_many

pytestmark = pytest.mark.xdist_group("test_growth")  # they share what a fixture makes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("many")
    write_many(runs)
    return runs


def test_the_status_of_a_thousand_runs_counts_every_cell(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = show_status(many, use_queue=False)
    assert {status.state for status in found} == {"done"}
    assert sum(len(status.measured) for status in found) == 3 * RUNS
    assert "1000 done" in capsys.readouterr().out


def test_a_query_over_a_thousand_runs_counts_every_cell(many: Path) -> None:
    folders = sorted(path.parent for path in many.glob("*/manifest.json"))
    answer = query(folders, "SELECT benchmark, count(*) FROM scores GROUP BY ALL ORDER BY ALL")
    assert answer.rows == tuple((name, METRICS * RUNS) for name in sorted(BENCHMARKS))


@pytest.mark.parametrize(
    "grid",
    [
        ("method=rome,none", "seed=range(0,30)", "num_edits=1,2,3,5,7,10,15,20,30,50", "benchmark=edit-quality,perplexity,quick,mmlu,mmlu"),
        ("method=rome,none", "seed=range(0,750)", "num_edits=1"),
    ],
    ids=["folded", "a trajectory each"],
)
def test_a_grid_of_thousands_of_cells_is_planned_whole(grid: tuple[str, ...], cache_dir: Path, tmp_path: Path) -> None:
    program = Program(runs=tmp_path / "runs", cache=cache_dir)
    command = [text for text in program.command("-m", *grid, "hydra.sweeper.plan_only=true") if not text.startswith("benchmark")]
    command += [text for text in grid if text.startswith("benchmark=")]
    output = program.run(command)
    assert "evaluations; in the store: 0" in output
    cells = int(output.split(" evaluations;")[0].split()[-1])
    assert cells >= 2500
