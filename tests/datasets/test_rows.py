from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editeval.datasets.rows import (
    LoadedRows,
    Row,
    RowError,
    RowNote,
    last_mention,
    load_requests,
    make_request,
    read_rows,
    with_placeholder,
)
from editeval.types import DatasetError, EditRequest
from tests.datasets.examples import write_lines

PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="{}"), max_size=30)


def parse(row: Row) -> EditRequest:
    return make_request(
        row, request_id=row.identifier("id"), prompt=row.text("prompt"), subject=row.text("subject"), target_new=row.text("target")
    )


def fields(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "prompt": "{} lies in", "subject": f"Tower {number}", "target": "Rome", **changes}


def load(path: Path, on_bad_row: str = "error") -> LoadedRows:
    return load_requests(read_rows(path), parse, on_bad_row=on_bad_row)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "".join(json.dumps(fields(number)) + "\n" for number in (1, 2))),
        ("lines.json", "".join(json.dumps(fields(number)) + "\n" for number in (1, 2))),
        ("list.json", json.dumps([fields(1), fields(2)], indent=1)),
        ("by-key.json", json.dumps({"x": fields(1), "y": fields(2)})),
        ("blank-lines.jsonl", f"\n{json.dumps(fields(1))}\r\n\n{json.dumps(fields(2))}"),
    ],
)
def test_json_lines_lists_and_objects_of_rows_give_the_same_requests(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert [request.subject for request in load(path).requests] == ["Tower 1", "Tower 2"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"id": 2, "prompt": "{} lies in", "target": "Rome"}, "field subject is missing; the row has: id, prompt, target"),
        (fields(2, subject=None), "field subject is missing"),
        (fields(2, target=" \n"), "field target is empty"),
        (fields(2, target=["Rome"]), r"field target must be text; got list \['Rome'\]"),
        (fields(2, id=True), "field id must be text; got bool True"),
        (fields(1), "duplicate id 1, already in row 1"),
        (fields(2, prompt="It lies in"), "holds 0 placeholders"),
        (fields(2, prompt="{} lies in {}"), "holds 2 placeholders"),
        (fields(2, subject="\ud800"), "surrogates not allowed"),
        ([1, 2], r"a row must be an object with fields; got list \[1, 2\]"),
    ],
)
def test_a_bad_row_is_reported_with_file_row_and_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(fields(1)) + "\n" + json.dumps(bad) + "\n" + json.dumps(fields(3)) + "\n")
    with pytest.raises(DatasetError, match=rf"rows\.jsonl row 2: .*{reason}.*1 bad of 3 rows.*dataset\.on_bad_row=skip"):
        load(path)
    loaded = load(path, "skip")
    assert [request.request_id for request in loaded.requests] == ["1", "3"]
    assert [(note.file, note.number) for note in loaded.skipped] == [(str(path), 2)]
    assert "2 rows kept, 1 left out" in loaded.summary()


@pytest.mark.parametrize("cut", [b'{"id": 3, "prom', b"\xff\xfe", b"plain text"])
def test_a_line_that_is_cut_off_is_a_bad_row(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(fields(1)).encode() + b"\n" + json.dumps(fields(2)).encode() + b"\n" + cut)
    with pytest.raises(DatasetError, match=r"rows\.jsonl row 3: the line is no whole JSON object.*cut off"):
        load(path)
    assert len(load(path, "skip").requests) == 2


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("content", [b'[{"id": 1}, {"id"', b"", b"\xff\xfe[]", b'"text"', b"3"])
def test_a_json_file_that_is_no_list_of_rows_is_an_error_under_either_policy(tmp_path: Path, content: bytes, policy: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"rows\.json"):
        load(path, policy)


def test_a_file_without_a_valid_row_is_an_error_under_either_policy(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [fields(1, target="")])
    with pytest.raises(DatasetError, match=r"no valid row: .*row 1: field target is empty"):
        load(path, "skip")
    with pytest.raises(DatasetError, match="no valid row"):
        load(write_lines(tmp_path / "none.jsonl", []))


def test_many_bad_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [fields(number, target="") for number in range(9)] + [fields(10)])
    with pytest.raises(DatasetError, match=r"row 5: field target is empty; and 4 more \[9 bad of 10 rows\]") as caught:
        load(path)
    assert "row 6" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot read .*none\.jsonl: No such file"):
        read_rows(tmp_path / "none.jsonl")


def test_texts_are_stripped_at_their_ends_and_kept_inside() -> None:
    row = Row(fields={"a": " one\n two ", "b": ["x ", " y"]}, file="f", number=1)
    assert row.text("a") == "one\n two"
    assert row.texts("a") == ("one\n two",)
    assert row.texts("b") == ("x", "y")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "must be a text or a list of texts; got int 3"),
        (["x", ""], r"field b\[1\] must be text with something"),
        ([{}], r"field b\[0\]"),
    ],
)
def test_a_list_of_texts_names_the_entry_that_is_wrong(value: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        Row(fields={"b": value}, file="f", number=1).texts("b")


def test_a_field_inside_an_object_is_named_by_its_path() -> None:
    row = Row(fields={"a": {"b": [{"c": 1}]}, "d": 3}, file="f", number=1)
    with pytest.raises(RowError, match=r"field a\.b\[0\]\.c must be text"):
        row.inner("a").inners("b")[0].text("c")
    with pytest.raises(RowError, match="field d must be an object; got int 3"):
        row.inner("d")
    with pytest.raises(RowError, match="field d must be a list of objects"):
        row.inners("d")


@given(PLAIN, PLAIN.filter(bool), PLAIN)
def test_putting_the_subject_back_gives_the_prompt_again(before: str, subject: str, after: str) -> None:
    prompt = before + subject + after
    template = with_placeholder(prompt, subject)
    assert template.count("{}") == 1
    assert template.replace("{}", subject) == prompt


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("Lyon is the twin of Lyon, no?", "Lyon", "Lyon is the twin of {}, no?"),
        ("i want to be with you everywhere song?", "i", "{} want to be with you everywhere song?"),
        ("Lyonese Lyon Lyonnais", "Lyon", "Lyonese {} Lyonnais"),
        ("superLyonese", "Lyon", "super{}ese"),
        ("aaa a aaa", "a", "aaa {} aaa"),
        ("Is C++ C?", "C++", "Is {} C?"),
    ],
)
def test_the_last_whole_mention_of_the_subject_becomes_the_placeholder(prompt: str, subject: str, template: str) -> None:
    assert with_placeholder(prompt, subject) == template


def test_a_subject_that_is_not_in_its_prompt_is_refused() -> None:
    with pytest.raises(RowError, match="subject 'Lyon' is not in its prompt 'The twin of lyon'"):
        with_placeholder("The twin of lyon", "Lyon")
    assert last_mention("The twin of lyon", "Lyon") is None


def test_a_row_that_names_its_subject_twice_is_noted() -> None:
    row = Row(fields={"id": "a", "prompt": "Lyon and {} are", "subject": "Lyon", "target": "Rome"}, file="f", number=4)
    loaded = load_requests([row], parse, on_bad_row="error")
    assert loaded.notes == (RowNote(file="f", number=4, reason="the prompt names 'Lyon' more than once; the edit is at its last mention"),)


def test_the_source_hash_depends_on_the_rows_content_and_not_on_the_order_of_its_fields() -> None:
    def hash_of(raw: dict[str, Any]) -> str:
        return parse(Row(fields=raw, file="f", number=1)).source_hash

    assert hash_of(fields(1)) == hash_of(dict(reversed(fields(1).items())))
    assert hash_of(fields(1)) != hash_of(fields(1, more="x"))


def test_a_true_target_that_is_the_new_one_is_dropped() -> None:
    row = Row(fields={}, file="f", number=1)
    made = make_request(row, request_id="a", prompt="{} is", subject="x", target_new="ROME ", target_true="Rome")
    assert made.target_true is None
