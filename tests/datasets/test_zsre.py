from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from editeval.datasets.knowedit import KnowEdit
from editeval.datasets.qaedit import QAEdit
from editeval.datasets.source import RowDataset
from editeval.datasets.zsre import ZsRE
from editeval.types import DatasetError, EditRequest, Probe
from tests.datasets.examples import Fields, knowedit_row, mend_row, qaedit_row, without, write_lines


def dataset(kind: type[RowDataset], folder: Path, *rows: Fields, **settings: Any) -> RowDataset:
    return kind(name="set", subset="part", split="test", file=str(write_lines(folder / "rows.jsonl", rows)), **settings)


def only(kind: type[RowDataset], folder: Path, row: Fields) -> EditRequest:
    (request,) = dataset(kind, folder, row).load()
    return request


def test_a_row_of_mend_writes_alt_over_the_first_true_answer(tmp_path: Path) -> None:
    request = only(ZsRE, tmp_path, mend_row())
    assert request.full_prompt == "What university did Watts Humphrey attend?"
    assert request.prompt == "What university did {} attend?"
    assert request.target_new == "University of Michigan"
    assert request.target_true == "Illinois Institute of Technology", "pred is what another model answered, not the truth"
    assert request.paraphrase_prompts == ("What university did Watts Humphrey take part in?",)
    assert request.neighborhood_prompts == (Probe(prompt="nq question: who played the drummer in the film", answer="Ann Lee"),)


def test_the_optional_fields_of_mend_may_be_missing(tmp_path: Path) -> None:
    row = mend_row()
    for name in ("pred", "answers", "cond"):
        row = without(row, name)
    assert only(ZsRE, tmp_path, row).target_true is None


def test_an_alt_that_is_one_of_the_true_answers_has_no_other_true_target(tmp_path: Path) -> None:
    assert only(ZsRE, tmp_path, mend_row(alt="iit")).target_true is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (mend_row(alt=""), "field alt is empty"),
        (mend_row(alt=None), "field alt is missing"),
        (mend_row(subject="Ann Lee"), "subject 'Ann Lee' is not in its prompt"),
        (mend_row(answers={"a": 1}), "field answers must be a text or lists of texts; got dict"),
        (without(mend_row(), "loc_ans"), "field loc_ans is missing"),
        (mend_row(rephrase=""), "field rephrase is empty"),
        ({"question": "x"}, "neither MEND's field src nor EasyEdit's prompt; fields: question"),
        (mend_row(), "duplicate id zsre/"),
    ],
)
def test_a_row_that_cannot_be_an_edit_is_refused_with_its_reason(tmp_path: Path, row: Fields, reason: str) -> None:
    with pytest.raises(DatasetError, match=rf"rows\.jsonl row 2: .*{reason}"):
        dataset(ZsRE, tmp_path, mend_row(), row).load()
    assert len(dataset(ZsRE, tmp_path, mend_row(), row, on_bad_row="skip").load()) == 1


@pytest.mark.parametrize("row", [mend_row(alt="Yale\ud800"), knowedit_row(target_new="Yale\ud800")])
def test_a_target_that_is_no_valid_unicode_is_a_bad_row_like_any_other(tmp_path: Path, row: Fields) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in (mend_row(), row)))
    given = ZsRE(name="set", subset="part", split="test", file=str(path))
    with pytest.raises(DatasetError, match=r"rows\.jsonl row 2: .*surrogates not allowed"):
        given.load()
    assert len(replace(given, on_bad_row="skip").load()) == 1


def test_the_id_is_of_what_is_edited_and_not_of_where_the_row_stands(tmp_path: Path) -> None:
    first, second = dataset(ZsRE, tmp_path, mend_row(alt="Yale"), mend_row()).load()
    assert only(ZsRE, tmp_path, mend_row(loc="nq question: another", pred="x")).request_id == second.request_id
    assert first.request_id != second.request_id


def test_the_same_fact_has_one_id_in_both_formats(tmp_path: Path) -> None:
    assert only(ZsRE, tmp_path, knowedit_row()).request_id == only(ZsRE, tmp_path, mend_row()).request_id


def test_knowedit_questions_expect_their_first_answer_and_are_left_out_without_one(tmp_path: Path) -> None:
    request = only(KnowEdit, tmp_path, knowedit_row())
    assert request.request_id.startswith("knowedit/part/")
    assert request.target_true == "Illinois Institute of Technology"
    assert request.portability == (Probe(prompt="In which state did Watts Humphrey study?", answer="Michigan"),)
    assert request.neighborhood_prompts == (Probe(prompt="Watts Humphrey's job is", answer="engineer"),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"portability": []}, r"field portability must be an object; got list \[\]"),
        ({"portability": {"Reasoning": "x"}}, r"field portability\.Reasoning must be a list of objects"),
        ({"locality": {"R": [{"ground_truth": "x"}]}}, r"field locality\.R\[0\]\.prompt is missing"),
        ({"locality": {"R": [{"prompt": "x", "ground_truth": 4}]}}, r"field locality\.R\[0\]\.ground_truth must be a text"),
    ],
)
def test_a_wrong_question_of_knowedit_is_named_by_its_path(tmp_path: Path, changes: Fields, reason: str) -> None:
    with pytest.raises(DatasetError, match=reason):
        dataset(KnowEdit, tmp_path, knowedit_row(**changes)).load()


def test_recent_facts_have_no_true_target(tmp_path: Path) -> None:
    assert only(KnowEdit, tmp_path, without(knowedit_row(), "ground_truth")).target_true is None


def test_qaedit_ids_are_those_of_its_sources(tmp_path: Path) -> None:
    rows = dataset(QAEdit, tmp_path, qaedit_row(), qaedit_row(source="NQ")).load()
    assert [request.request_id for request in rows] == ["qaedit/SQA/3", "qaedit/NQ/3"]
    assert rows[0].prompt == "Who built the {}?"
    assert rows[0].neighborhood_prompts == (Probe(prompt="who played the drummer", answer="Jean Morin"),)
    assert rows[0].target_true is None
