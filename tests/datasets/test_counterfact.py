from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from editeval.datasets.counterfact import CounterFact
from editeval.interfaces import EditDataset
from editeval.types import DatasetError, Probe
from tests.datasets.examples import Fields, easyedit_row, rome_row, without, write_lines


def dataset(folder: Path, *rows: Fields, **settings: Any) -> CounterFact:
    path = write_lines(folder / "rows.jsonl", rows)
    return CounterFact(name="counterfact", subset="rome", split="test", file=str(path), **settings)


def test_a_row_of_rome_keeps_every_prompt_and_expects_the_true_target_of_neighbours(tmp_path: Path) -> None:
    (request,) = dataset(tmp_path, rome_row(7)).load()
    assert request.request_id == "counterfact/7"
    assert (request.prompt, request.subject) == ("The mother tongue of {} is", "Danielle Darrieux")
    assert (request.target_new, request.target_true) == ("English", "French")
    assert request.paraphrase_prompts == ("Danielle Darrieux, a native", "A sentence before.\nDanielle Darrieux speaks")
    assert request.neighborhood_prompts == (
        Probe(prompt="The mother tongue of Louis Brunel is", answer="French"),
        Probe(prompt="Jean Morin natively speaks", answer="French"),
    )


def test_a_row_of_easyedit_becomes_the_same_fact_as_its_row_of_rome(tmp_path: Path) -> None:
    (of_rome,) = dataset(tmp_path, rome_row(7)).load()
    (of_easyedit,) = dataset(tmp_path, easyedit_row(7)).load()
    for name in ("request_id", "prompt", "subject", "target_new", "target_true"):
        assert getattr(of_easyedit, name) == getattr(of_rome, name)
    assert of_easyedit.paraphrase_prompts == of_rome.paraphrase_prompts[:1]
    assert of_easyedit.neighborhood_prompts == of_rome.neighborhood_prompts[1:]
    assert of_easyedit.source_hash != of_rome.source_hash


def test_both_formats_may_stand_in_one_file(tmp_path: Path) -> None:
    rows = dataset(tmp_path, rome_row(1), easyedit_row(2)).load()
    assert [request.request_id for request in rows] == ["counterfact/1", "counterfact/2"]


def test_targets_lose_their_leading_space(tmp_path: Path) -> None:
    rows = dataset(tmp_path, easyedit_row(1, target_new=" English"), rome_row(2, target_new={"str": " English"})).load()
    assert [request.target_new for request in rows] == ["English", "English"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (without(rome_row(), "case_id"), "field case_id is missing"),
        (without(rome_row(), "paraphrase_prompts"), "field paraphrase_prompts is missing"),
        (rome_row(target_new={"id": "Q1"}), r"field requested_rewrite\.target_new\.str is missing"),
        (rome_row(target_new="English"), r"field requested_rewrite\.target_new must be an object; got str 'English'"),
        (rome_row(target_true={"str": ""}), r"field requested_rewrite\.target_true\.str is empty"),
        (rome_row(prompt="The mother tongue of Danielle Darrieux is"), "holds 0 placeholders"),
        (rome_row(target_new={"str": "french"}), "the new target 'french' is the true one"),
        (easyedit_row(subject="Jean Morin"), "subject 'Jean Morin' is not in its prompt"),
        (easyedit_row(target_new="French"), "the new target 'French' is the true one"),
        (easyedit_row(ground_truth=5), "field ground_truth must be a text or a list of texts; got int 5"),
        (without(easyedit_row(), "locality_ground_truth"), "field locality_ground_truth is missing"),
        (without(easyedit_row(), "rephrase_prompt"), "field rephrase_prompt is missing"),
        ({"src": "x"}, "neither ROME's field requested_rewrite nor EasyEdit's prompt and target_new; fields: src"),
    ],
)
def test_a_row_that_cannot_be_an_edit_is_refused_with_its_reason(tmp_path: Path, row: Fields, reason: str) -> None:
    with pytest.raises(DatasetError, match=rf"rows\.jsonl row 2: .*{reason}"):
        dataset(tmp_path, rome_row(1), row).load()
    assert len(dataset(tmp_path, rome_row(1), row, on_bad_row="skip").load()) == 1


def test_a_record_that_stands_twice_is_a_duplicate(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="row 2: duplicate id counterfact/7, already in row 1"):
        dataset(tmp_path, rome_row(7), easyedit_row(7)).load()


def test_it_is_an_edit_dataset(tmp_path: Path) -> None:
    assert isinstance(dataset(tmp_path, rome_row()), EditDataset)
