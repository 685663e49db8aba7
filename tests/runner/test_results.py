"""Scores on disk: what counts as measured, what is stale, what a kill costs."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from editeval.files import Cache
from editeval.runner.results import CURRENT_FILE, SCORES_FILE, BaseScores, CellKey, ScoreStore
from editeval.runner.run_files import EDITS_FILE, append_edit, read_edits, read_manifest, write_manifest
from editeval.types import EditevalError, Evaluation, Measurement


def measurement(metric: str, value: float, **fields: Any) -> Measurement:
    return Measurement(**{"task": "facts", "metric": metric, "protocol": "generation", "value": value, "n": 10, **fields})


EVALUATION = Evaluation(
    measurements=(measurement("efficacy", 0.1 + 0.2, stderr=1 / 3), measurement("locality", 1.0, chance=0.5, higher_is_better=True)),
    samples=({"request_id": "a", "log_prob": -1.5}, {"request_id": "b", "log_prob": -math.inf}),
)


def record(store: ScoreStore, evaluation: Evaluation = EVALUATION, *, num_edits: int = 5, key: str = "k" * 64, digest: str = "d5") -> None:
    store.record(evaluation, benchmark="edit-quality", benchmark_key=key, num_edits=num_edits, state_digest=digest, seconds=1.25)


def cell_key(*, num_edits: int = 5, key: str = "k" * 64, digest: str = "d5") -> CellKey:
    return CellKey(num_edits=num_edits, benchmark="edit-quality", benchmark_key=key, state_digest=digest)


def test_scores_come_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    written = ScoreStore(tmp_path).record(
        EVALUATION, benchmark="edit-quality", benchmark_key="k", num_edits=5, state_digest="d5", seconds=0.7
    )
    assert ScoreStore(tmp_path).scores() == written
    assert written[0].value == 0.1 + 0.2
    assert written[0].name == "edit-quality/facts.efficacy.generation"


def test_of_two_settings_of_a_benchmark_at_a_rung_the_current_one_counts(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    record(store, key="few", num_edits=0)
    record(store, key="few", num_edits=5)
    record(store, key="many", num_edits=0)  # the ladder was extended: the unedited model is asked about more facts
    store.make_current(cell_key(num_edits=0, key="many"))
    assert {(score.num_edits, score.benchmark_key) for score in ScoreStore(tmp_path).scores({0: "d5", 5: "d5"})} == {
        (0, "many"),
        (5, "few"),
    }
    assert not (tmp_path / CURRENT_FILE).exists(), "what was measured last needs no word"
    store.make_current(cell_key(num_edits=0, key="few"))  # the first ladder again: found on disk, not measured
    assert {score.benchmark_key for score in ScoreStore(tmp_path).scores({0: "d5"})} == {"few"}
    record(store, key="more", num_edits=0)
    store.make_current(cell_key(num_edits=0, key="more"))
    assert {score.benchmark_key for score in ScoreStore(tmp_path).scores({0: "d5"})} == {"more"}
    assert store.has(cell_key(num_edits=0, key="many")), "the others are kept"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_come_back_and_the_file_is_standard_json(tmp_path: Path, value: float) -> None:
    record(ScoreStore(tmp_path), Evaluation(measurements=(measurement("perplexity", value, stderr=math.nan),)))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads((tmp_path / SCORES_FILE).read_text(), parse_constant=refuse)
    assert row["value"] is None
    (score,) = ScoreStore(tmp_path).scores()
    assert repr(score.value) == repr(value)
    assert score.stderr is not None
    assert math.isnan(score.stderr)


def test_a_cell_cut_at_any_byte_is_not_there_and_measuring_again_makes_it_whole(tmp_path: Path) -> None:
    whole = ScoreStore(tmp_path / "whole")
    record(whole, num_edits=1, digest="d1")
    before = (tmp_path / "whole" / SCORES_FILE).stat().st_size
    record(whole)
    data = (tmp_path / "whole" / SCORES_FILE).read_bytes()
    cuts = random.Random(0).sample(range(before + 1, len(data) - 1), 25)
    for cut in sorted({before, len(data) - 2, *cuts}):
        run = tmp_path / f"cut-{cut}"
        run.mkdir()
        (run / SCORES_FILE).write_bytes(data[:cut])
        store = ScoreStore(run)
        assert store.has(cell_key(num_edits=1, digest="d1"))
        assert not store.has(cell_key()), f"half a cell was accepted at byte {cut}"
        assert [score.num_edits for score in store.scores()] == [1, 1]
        record(store)
        assert store.scores() == whole.scores()


def test_a_cell_without_its_last_newline_is_whole(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    record(store)
    path = tmp_path / SCORES_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert ScoreStore(tmp_path).has(cell_key())


def test_torn_lines_and_cells_are_counted(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    record(store)
    path = tmp_path / SCORES_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert (store.torn_lines, store.torn_cells) == (1, 1)


def test_scores_of_a_state_that_no_longer_stands_are_not_served(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    record(store, digest="old")
    record(store, num_edits=1, digest="d1")
    assert not store.has(cell_key(digest="new"))
    assert [score.num_edits for score in store.scores({1: "d1", 5: "new"})] == [1, 1]
    record(store, digest="new")
    assert {score.state_digest for score in store.scores({5: "new"})} == {"new"}
    assert {score.state_digest for score in store.scores()} == {"d1", "new"}, "without digests the last measured state counts"


def test_a_cell_measured_again_replaces_the_first_and_is_not_doubled(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    record(store)
    record(store, Evaluation(measurements=(measurement("efficacy", 0.5), measurement("locality", 0.25))))
    assert [score.value for score in store.scores()] == [0.5, 0.25]


def test_other_settings_of_a_benchmark_are_another_cell(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    record(store)
    assert not store.has(cell_key(key="other"))
    with pytest.raises(KeyError):
        store.cell(cell_key(key="other"))
    assert len(store.cell(cell_key())) == 2


def test_samples_come_back_and_equal_samples_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        record(ScoreStore(tmp_path / name))
    samples = ScoreStore(tmp_path / "one").samples(5, "edit-quality")
    assert samples == EVALUATION.samples
    one, two = ((tmp_path / name / "samples" / f"5-edit-quality-{'k' * 8}.jsonl.gz").read_bytes() for name in ("one", "two"))
    assert one == two
    assert ScoreStore(tmp_path / "one").samples(9, "edit-quality") == ()


def test_samples_are_on_disk_before_their_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, rows: list[Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("editeval.runner.results.append_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        record(ScoreStore(tmp_path))
    assert gzip.decompress((tmp_path / "samples" / f"5-edit-quality-{'k' * 8}.jsonl.gz").read_bytes())


def test_a_reader_sees_what_another_process_appends(tmp_path: Path) -> None:
    reader, writer = ScoreStore(tmp_path), ScoreStore(tmp_path)
    assert not reader.has(cell_key())
    record(writer)
    assert reader.has(cell_key())


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (Evaluation(measurements=()), "no measurement"),
        (Evaluation(measurements=(measurement("efficacy", 1.0), measurement("efficacy", 0.0))), "facts.efficacy.generation more than once"),
    ],
)
def test_an_evaluation_that_cannot_be_stored_is_refused(tmp_path: Path, evaluation: Evaluation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(ScoreStore(tmp_path), evaluation)
    assert not (tmp_path / SCORES_FILE).exists()


def test_base_scores_are_shared_between_runs_and_keyed_by_weights_and_settings(tmp_path: Path) -> None:
    BaseScores(Cache(tmp_path)).put("weights", "settings", EVALUATION, 3.5)
    assert BaseScores(Cache(tmp_path)).get("weights", "settings") == (EVALUATION, 3.5)
    assert BaseScores(Cache(tmp_path)).get("weights", "others") is None
    assert BaseScores(Cache(tmp_path)).get("others", "settings") is None


def test_damaged_base_scores_are_named(tmp_path: Path) -> None:
    base = BaseScores(Cache(tmp_path))
    base.put("weights", "settings", EVALUATION, 3.5)
    (path,) = (tmp_path / BaseScores.KIND).iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EditevalError, match=f"{path.name}.*delete that file"):
        base.get("weights", "settings")


def test_manifest_comes_back_and_a_folder_without_one_is_no_run(tmp_path: Path) -> None:
    manifest = {"edit_key": "ab", "model_fingerprint": "cd", "config": {"method": {"clamp": math.inf, "layers": [1, 2]}}}
    write_manifest(tmp_path / "run", manifest)
    assert read_manifest(tmp_path / "run") == manifest
    with pytest.raises(EditevalError, match="no run's folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("lacking", ["config", "edit_key", "model_fingerprint"])
def test_a_manifest_that_does_not_say_which_run_it_is_is_named(tmp_path: Path, lacking: str) -> None:
    manifest = {"edit_key": "ab", "model_fingerprint": "cd", "config": {}}
    del manifest[lacking]
    write_manifest(tmp_path, manifest)
    with pytest.raises(EditevalError, match=rf"manifest\.json lacks {lacking}; run the same command again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("line", ["[1]", "3", "null", '"text"'])
def test_a_line_that_holds_no_object_counts_as_torn(tmp_path: Path, line: str) -> None:
    (tmp_path / SCORES_FILE).write_text(f"{line}\n")
    store = ScoreStore(tmp_path)
    assert (store.scores(), store.torn_lines) == ((), 1)


def test_edit_log_keeps_the_later_row_of_a_step_and_skips_torn_lines(tmp_path: Path) -> None:
    append_edit(tmp_path, {"step": 2, "digest": "old"})
    append_edit(tmp_path, {"step": 1, "digest": "a", "diagnostics": {"loss": math.nan}})
    append_edit(tmp_path, {"step": 2, "digest": "new"})
    with (tmp_path / EDITS_FILE).open("a") as file:
        file.write('{"no": "step"}\n{"step": 3, "dig')
    rows = read_edits(tmp_path)
    assert [(row["step"], row["digest"]) for row in rows] == [(1, "a"), (2, "new")]
    assert math.isnan(rows[0]["diagnostics"]["loss"])
