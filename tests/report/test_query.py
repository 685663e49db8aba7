"""SQL over the files of many runs sees what `ScoreStore` says, whatever was measured twice, superseded or torn."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editeval.__main__ import main
from editeval.report.query import query
from editeval.runner.results import SCORES_FILE, CellKey, ScoreStore
from editeval.runner.run_files import append_edit, write_manifest
from editeval.types import EditevalError, Evaluation, Measurement

ALL = "SELECT run, num_edits, benchmark, benchmark_key, state_digest, task, metric, protocol, value, stderr, n FROM scores"
WRITE = st.fixed_dictionaries(
    {
        "num_edits": st.sampled_from([0, 1, 5]),
        "benchmark": st.sampled_from(["mmlu", "quick"]),
        "benchmark_key": st.sampled_from(["a", "b"]),
        "state_digest": st.sampled_from(["s", "t"]),
        "values": st.lists(st.sampled_from([0.25, 0.5, math.inf, math.nan]), min_size=1, max_size=3),
        "then_current": st.booleans(),
        "torn": st.integers(0, 3),
    }
)


def make_run(folder: Path, *, method: str = "rome") -> ScoreStore:
    config = {"model": {"name": "tiny"}, "method": {"name": method}, "dataset": {"name": "facts"}, "seed": 3}
    write_manifest(folder, {"edit_key": "e", "model_fingerprint": "s", "config": config})
    return ScoreStore(folder)


def evaluation(*values: float) -> Evaluation:
    return Evaluation(
        measurements=tuple(
            Measurement(task=f"t{place}", metric="accuracy", protocol="likelihood", value=value, stderr=0.1, n=4)
            for place, value in enumerate(values)
        )
    )


def said(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value  # nan is equal to itself here


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(WRITE, min_size=1, max_size=8))
def test_the_table_holds_the_scores_that_stand(writes: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("runs") / "run"
    store = make_run(folder)
    for write in writes:
        cell = {name: write[name] for name in ("num_edits", "benchmark", "benchmark_key", "state_digest")}
        store.record(evaluation(*write["values"]), seconds=1.0, **cell)
        if write["then_current"]:
            other = {**cell, "benchmark_key": "a" if cell["benchmark_key"] == "b" else "b"}
            store.make_current(CellKey(**other))
        if write["torn"] == 1:
            data = (folder / SCORES_FILE).read_bytes()
            (folder / SCORES_FILE).write_bytes(data[:-30])
    expected = {
        (str(folder), *(said(getattr(score, name)) for name in ALL.replace(" FROM scores", "").split(", ")[1:]))
        for score in ScoreStore(folder).scores()
    }
    found = [tuple(map(said, row)) for row in query([folder], ALL).rows]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_runs_and_edits_are_tables_too_and_a_later_edit_of_a_step_replaces_the_earlier(tmp_path: Path) -> None:
    for method in ("rome", "memit"):
        make_run(tmp_path / method, method=method)
        for digest in ("old", "new"):
            append_edit(
                tmp_path / method,
                {"step": 1, "num_edits": 1, "request_ids": ["a"], "seconds": 2.0, "digest": digest, "diagnostics": {"loss": 0.5}},
            )
    folders = [tmp_path / "rome", tmp_path / "memit"]
    answer = query(folders, "SELECT method, seed, digest, diagnostics->>'$.loss' FROM edits ORDER BY method")
    assert answer.rows == (("memit", 3, "new", "0.5"), ("rome", 3, "new", "0.5"))
    assert query(folders, "SELECT count(*) FROM runs").rows == ((2,),)
    assert query(folders).rows == (), "nothing is measured yet"


def test_the_command_prints_a_table_and_writes_every_row_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run").record(
        evaluation(0.25, 0.5), benchmark="mmlu", benchmark_key="k", num_edits=1, state_digest="s", seconds=1.0
    )
    file = tmp_path / "answers" / "scores.csv"
    assert main(["query", str(tmp_path), "SELECT task, value FROM scores ORDER BY task", "--to", str(file)]) == 0
    assert "2 rows" in capsys.readouterr().out
    with file.open() as lines:
        assert list(csv.DictReader(lines)) == [{"task": "t0", "value": "0.25"}, {"task": "t1", "value": "0.5"}]


def test_a_wrong_question_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    assert main(["query", str(tmp_path), "SELECT colour FROM scores"]) == 2
    error = capsys.readouterr().err
    assert "colour" in error
    assert "DESCRIBE scores" in error
    with pytest.raises(EditevalError, match="a file that ends in"):
        query([tmp_path / "run"], to=tmp_path / "answer.xlsx")


def test_a_manifest_with_settings_of_any_kind_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["method"]["prefixes"] = ["a", {"b": None}]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    assert query([folder], "SELECT method FROM runs").rows == (("rome",),)
