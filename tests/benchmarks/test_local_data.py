"""Local benchmark rows: the layout, and every way in which a copy can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editeval.benchmarks.local_data import LocalData
from editeval.files import files_hash
from editeval.types import DatasetError
from tests.benchmarks.conftest import write_rows


def test_splits_are_the_files_of_the_config_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "mmlu" / "anatomy" / "dev.jsonl", [{"a": 1}])
    write_rows(tmp_path / "mmlu" / "anatomy" / "test.jsonl", [{"a": 2}])
    data = LocalData(folder=tmp_path / "mmlu")
    assert sorted(data.splits("anatomy")) == ["dev", "test"]
    assert data.rows(data.splits("anatomy")["test"]) == [{"a": 2}]
    assert LocalData(folder=tmp_path / "mmlu" / "anatomy").splits(None) == data.splits("anatomy")


def test_folder_without_splits_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "empty").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"holds no <split>\.jsonl"):
        LocalData(folder=tmp_path / "mmlu").splits("empty")
    with pytest.raises(DatasetError, match=r"no folder .*astronomy; .* has empty"):
        LocalData(folder=tmp_path / "mmlu").splits("astronomy")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DatasetError, match=r"no folder .*mmlu; .*bare holds no folder; set paths\.data"):
        LocalData(folder=tmp_path / "bare" / "mmlu").splits(None)
    with pytest.raises(DatasetError, match="its parent is missing too"):
        LocalData(folder=tmp_path / "nowhere" / "mmlu").splits(None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1}\n{"a": ', "line 2: not JSON"),
        ("[1, 2]\n", "line 1: a JSON list"),
        ("\n", "has no rows"),
        ('{"a": 1, "b": 2}\n\n{"a": 1}\n', "line 3: lacks 'b', unlike the first row"),
        ('{"a": 1}\n{"a": 1, "c": 3}\n', "line 2: has 'c' too, unlike the first row"),
    ],
)
def test_broken_file_names_its_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(content)
    with pytest.raises(DatasetError, match=reason):
        LocalData(folder=tmp_path).rows(path)


def test_unicode_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"a": "one\u2028two\x85three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert LocalData(folder=tmp_path).rows(path) == [{"a": "one\u2028two\x85three"}]


def test_hash_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(tmp_path / name / "x" / "test.jsonl", [{"a": 1}])
    assert files_hash(tmp_path / "one", "**/*.jsonl") == files_hash(tmp_path / "two", "**/*.jsonl")
    (tmp_path / "two" / "x" / "test.jsonl").rename(tmp_path / "two" / "x" / "dev.jsonl")
    assert files_hash(tmp_path / "one", "**/*.jsonl") != files_hash(tmp_path / "two", "**/*.jsonl")
    assert LocalData(folder=tmp_path / "one").content_hash == files_hash(tmp_path / "one", "**/*.jsonl")


def test_a_file_that_was_cut_within_a_character_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "café'.encode()[:-1])
    with pytest.raises(DatasetError, match=r"test\.jsonl, line 2: not JSON .* may be truncated"):
        LocalData(folder=tmp_path).rows(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(DatasetError, match=r"cannot read .*test\.jsonl: Is a directory"):
        LocalData(folder=tmp_path).rows(tmp_path / "test.jsonl")
