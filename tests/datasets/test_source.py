from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hydra.utils import instantiate

from editeval.datasets.counterfact import CounterFact
from editeval.datasets.source import RowDataset
from editeval.datasets.zsre import ZsRE
from editeval.types import ConfigError, DatasetError
from tests.conftest import Compose
from tests.datasets.examples import easyedit_row, mend_row, rome_row, without, write_lines


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Put a recorder in the hub's place; `hub` lists what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((repository, split, revision))
        return [rome_row(1), rome_row(2)]

    def download(repository: str, file: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repository, file, repo_type, revision))
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def counterfact(**settings: Any) -> CounterFact:
    return CounterFact(**{"name": "counterfact", "subset": "rome", "split": "test", **settings})


def test_a_folder_of_data_sets_is_read_and_nothing_asked_of_the_hub(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    write_lines(tmp_path / "counterfact" / "rome" / "test.jsonl", [rome_row(1)])
    made = counterfact(data=str(tmp_path), hub={"rome": {"id": "some/where"}})
    made.check()
    assert len(made.load()) == 1
    assert hub == []


def test_a_json_file_stands_in_for_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "counterfact" / "easyedit" / "edit.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([easyedit_row(1), easyedit_row(2)]))
    assert len(counterfact(data=str(tmp_path), subset="easyedit", split="edit").load()) == 2


def test_a_set_without_parts_has_no_middle_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "counterfact" / "test.jsonl", [rome_row(1)])
    assert len(counterfact(data=str(tmp_path), subset=None).load()) == 1


def test_a_file_of_ones_own_comes_before_the_folder(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [rome_row(5)])
    assert counterfact(data="/nowhere", file=str(path)).load()[0].request_id == "counterfact/5"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"data": "{}/none"}, r"paths\.data=.*none is no folder; give the folder that holds counterfact/"),
        ({"data": "{}/counterfact"}, r"has no folder counterfact; it has: easyedit, rome; set paths\.data"),
        ({"data": "{}", "subset": "memit"}, r"has no folder memit; it has: easyedit, rome; set dataset\.subset"),
        ({"data": "{}", "split": "validation"}, r"no file validation\.jsonl or validation\.json; its splits: test; set dataset\.split"),
        ({"file": "{}/none.jsonl"}, r"dataset\.file=.*none\.jsonl is no file"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(tmp_path: Path, settings: dict[str, str], reason: str) -> None:
    write_lines(tmp_path / "counterfact" / "rome" / "test.jsonl", [rome_row(1)])
    write_lines(tmp_path / "counterfact" / "easyedit" / "edit.jsonl", [easyedit_row(1)])
    made = counterfact(**{name: value.format(tmp_path) for name, value in settings.items()})
    with pytest.raises(DatasetError, match=reason):
        made.check()
    with pytest.raises(DatasetError, match=reason):
        made.load()


def test_a_subset_on_the_hub_is_loaded_at_its_revision(hub: list[tuple[Any, ...]]) -> None:
    made = counterfact(hub={"rome": {"id": "some/where", "revision": "abc"}})
    assert [request.request_id for request in made.load()] == ["counterfact/1", "counterfact/2"]
    assert hub == [("some/where", "test", "abc")]


def test_a_file_on_the_hub_is_read_as_it_is(tmp_path: Path, hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "edit.json", [easyedit_row(1), easyedit_row(1)])

    def download(*where: str, **how: str | None) -> str:
        hub.append((*where, how))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    made = counterfact(subset="easyedit", split="edit", hub={"easyedit": {"id": "some/where", "file": "data/{split}.json"}})
    with pytest.raises(DatasetError, match=r"some/where/data/edit\.json row 2: duplicate id counterfact/1"):
        made.load()
    assert hub == [("some/where", "data/edit.json", {"repo_type": "dataset", "revision": None})]


def test_without_a_network_the_error_says_which_local_file_would_do(hub: list[tuple[Any, ...]]) -> None:
    made = counterfact(subset="easyedit", split="edit", hub={"easyedit": {"id": "some/where", "file": "x.json"}})
    with pytest.raises(DatasetError, match=r"cannot get split edit of some/where from the hub: ConnectionError: no route.*") as caught:
        made.check()
    assert "set paths.data=DIR (reads DIR/counterfact/easyedit/edit.jsonl) or dataset.file=FILE" in str(caught.value)


def test_the_hubs_own_offline_error_is_a_clear_sentence() -> None:
    with pytest.raises(DatasetError, match=r"cannot get split test of some/where from the hub: .*paths\.data=DIR"):
        counterfact(hub={"rome": {"id": "some/where"}}).check()


def test_a_subset_without_a_copy_on_the_hub_names_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"no copy of the subset mend on the hub is known \(dataset\.hub has: rome\).*paths\.data=DIR"):
        counterfact(subset="mend", hub={"rome": {"id": "some/where"}}).check()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"on_bad_row": "ignore"}, r"dataset\.on_bad_row=ignore is unknown; one of: error, skip"),
        ({"hub": {"rome": {"id": "a/b", "sha": "x"}}}, r"dataset\.hub\.rome has no setting 'sha'; it knows: id, file, revision"),
        ({"hub": {"rome": {"file": "x"}}}, r"dataset\.hub\.rome has no id"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_object_is_made(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        counterfact(**settings)


def test_check_reads_no_further_than_the_first_valid_row(tmp_path: Path) -> None:
    made = counterfact(file=str(write_lines(tmp_path / "rows.jsonl", [rome_row(1), {"no": "row"}])))
    made.check()
    with pytest.raises(DatasetError, match="row 2"):
        made.load()


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_check_refuses_a_file_of_another_format(tmp_path: Path, policy: str) -> None:
    made = counterfact(file=str(write_lines(tmp_path / "rows.jsonl", [mend_row()])), on_bad_row=policy)
    with pytest.raises(DatasetError, match="row 1: neither ROME's field requested_rewrite"):
        made.check()


def test_knowing_cannot_be_asked_of_a_set_without_true_targets(tmp_path: Path) -> None:
    no_truth = without(mend_row(), "answers")
    made = ZsRE(name="zsre", subset="mend", split="test", file=str(write_lines(tmp_path / "rows.jsonl", [no_truth])), known_only=True)
    with pytest.raises(ConfigError, match=r"none of the 1 rows of .*rows\.jsonl has a true target; set dataset\.known_only=false"):
        made.check()
    path = write_lines(tmp_path / "rows.jsonl", [no_truth, mend_row(src="Where is Watts Humphrey?")])
    ZsRE(name="zsre", subset="mend", split="test", file=str(path), known_only=True).check()


def test_rows_left_out_are_reported_to_the_log_and_to_the_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [rome_row(1), rome_row(1), easyedit_row(2, target_new=""), rome_row(3)])
    made = counterfact(file=str(path), on_bad_row="skip")
    with caplog.at_level(logging.WARNING, logger="editeval"):
        assert len(made.load()) == 2
    assert "2 rows kept, 2 left out" in caplog.text
    assert [note.number for note in made.read().skipped] == [2, 3]


@pytest.mark.parametrize("name", ["counterfact", "zsre", "knowedit", "qaedit"])
def test_the_shipped_config_refuses_a_missing_folder_before_any_work(compose_config: Compose, tmp_path: Path, name: str) -> None:
    made = instantiate(compose_config(f"dataset={name}", f"paths.data={tmp_path}").dataset, _convert_="all")
    assert isinstance(made, RowDataset)
    with pytest.raises(DatasetError, match=f"has no folder {name}"):
        made.check()
