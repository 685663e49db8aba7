"""Every row of the public data sets, where a folder of them lies beside the checkout. Counts are of the samples there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editeval.datasets.counterfact import CounterFact
from editeval.datasets.knowedit import KnowEdit
from editeval.datasets.qaedit import QAEdit
from editeval.datasets.source import RowDataset
from editeval.datasets.zsre import ZsRE

pytestmark = pytest.mark.shared

EVERY_SET: list[tuple[type[RowDataset], str | None, str, int, dict[int, str]]] = [
    (CounterFact, "rome", "test", 359, {}),
    (CounterFact, "easyedit", "edit", 1186, {}),
    (CounterFact, "easyedit", "train", 1200, {}),
    (CounterFact, "easyedit", "val", 300, {}),
    (ZsRE, "mend", "train", 998, dict.fromkeys((535, 724), "field alt is empty")),
    (ZsRE, "mend_edit", "test", 761, {}),
    (KnowEdit, "zsre", "test", 993, dict.fromkeys((438, 492, 562, 634, 659, 766, 996), "duplicate id")),
    (KnowEdit, "wiki_counterfact", "test", 1043, dict.fromkeys(range(228, 236), "duplicate id")),
    (KnowEdit, "wiki_recent", "test", 425, {}),
    (QAEdit, None, "test", 723, {}),
]


@pytest.mark.parametrize(("kind", "subset", "split", "kept", "bad"), EVERY_SET)
def test_every_valid_row_loads_and_the_bad_ones_are_known(
    shared_data: Path, kind: type[RowDataset], subset: str | None, split: str, kept: int, bad: dict[int, str]
) -> None:
    made = kind(name="real", subset=subset, split=split, data=str(shared_data), on_bad_row="skip")
    made.check()
    rows = made.read()
    assert len(rows.requests) == kept
    assert {note.number for note in rows.skipped} == set(bad)
    for note in rows.skipped:
        assert bad[note.number] in note.reason


@pytest.mark.parametrize(
    ("kind", "subset", "split", "question"),
    [
        (CounterFact, "easyedit", "edit", "prompt"),
        (ZsRE, "mend", "train", "src"),
        (ZsRE, "mend_edit", "test", "src"),
        (KnowEdit, "zsre", "test", "prompt"),
        (QAEdit, None, "test", "prompt"),
    ],
)
def test_the_full_prompt_is_the_question_of_the_source(
    shared_data: Path, kind: type[RowDataset], subset: str | None, split: str, question: str
) -> None:
    path = shared_data / kind.folder / (subset or "") / f"{split}.jsonl"
    questions = {json.loads(line)[question] for line in path.read_text(encoding="utf-8").splitlines()}
    for request in kind(name="real", subset=subset, split=split, data=str(shared_data), on_bad_row="skip").load():
        assert request.full_prompt in questions


def test_records_that_are_in_both_formats_of_counterfact_are_one_fact(shared_data: Path) -> None:
    of_rome = CounterFact(name="real", subset="rome", split="test", data=str(shared_data)).load()
    full = {request.request_id: request for request in of_rome}
    shared = 0
    for split in ("edit", "train", "val"):
        for request in CounterFact(name="real", subset="easyedit", split=split, data=str(shared_data)).load():
            if request.request_id in full:
                shared += 1
                other = full[request.request_id]
                assert (request.full_prompt, request.target_new, request.target_true) == (
                    other.full_prompt,
                    other.target_new,
                    other.target_true,
                )
    assert shared >= 10
