"""Bytes that are missing at the end are the edit in flight; bytes that are wrong are named."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editeval.edits import journal as journal_module
from editeval.edits.journal import EditJournal
from editeval.types import JournalError
from tests.edits.writers import GENESIS, fill, flipped, make_mixed_edit, record, segments

STEPS = 3


def sizes_after_each_step(folder: Path) -> list[int]:
    """Record `STEPS` edits and return the file's size after the header's step 0 and after each edit, unclosed."""
    sizes = []
    with EditJournal.open(folder, genesis=GENESIS) as journal:
        for step in range(1, STEPS + 1):
            record(journal, step)
            sizes.append(segments(folder)[0].stat().st_size)
    return sizes


def test_a_file_cut_at_any_byte_holds_its_whole_edits_and_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(journal_module, "HEADER_SECONDS", 0.0)  # nobody is about to write the headers that are cut off here
    unbroken = fill(tmp_path / "unbroken", STEPS + 1)
    sizes = sizes_after_each_step(tmp_path / "cut")
    (file,) = segments(tmp_path / "cut")
    for length in range(file.stat().st_size, -1, -1):
        os.truncate(file, length)
        journal = EditJournal.open(tmp_path / "cut", genesis=GENESIS)
        whole = sum(size <= length for size in sizes)
        assert (len(journal), journal.head) == (whole, unbroken[whole])
        assert fill(tmp_path / "cut", STEPS + 1) == unbroken
        segments(tmp_path / "cut")[1].unlink()


@pytest.mark.parametrize("zeros", [1, 7, 8, 35, 36, 100, 5000])
def test_a_tail_that_was_never_filled_is_the_edit_in_flight(tmp_path: Path, zeros: int) -> None:
    sizes = sizes_after_each_step(tmp_path)
    file = segments(tmp_path)[0]
    data = file.read_bytes()
    states = fill(tmp_path / "unbroken", STEPS + 1)
    file.write_bytes(data[: sizes[-1]] + bytes(zeros))
    assert fill(tmp_path, STEPS + 1) == states


def test_an_edit_of_which_only_the_beginning_was_filled_is_in_flight(tmp_path: Path) -> None:
    unbroken = fill(tmp_path / "unbroken", STEPS)
    sizes = sizes_after_each_step(tmp_path / "whole")
    (file,) = segments(tmp_path / "whole")
    for filled in range(sizes[2] - 8, sizes[1] - 1, -1):
        os.truncate(file, filled)
        os.truncate(file, sizes[2])
        journal = EditJournal.open(file.parent, genesis=GENESIS)
        assert (len(journal), journal.head) == (STEPS - 1, unbroken[STEPS - 1])


@pytest.mark.parametrize("mask", [0xFF, 0x01, 0x80])
def test_any_flipped_byte_is_named_with_file_offset_and_step(tmp_path: Path, mask: int) -> None:
    sizes = sizes_after_each_step(tmp_path)
    with EditJournal.open(tmp_path, genesis=GENESIS) as journal:
        journal.append(["last"], make_mixed_edit(4), 1.0)
    for file in segments(tmp_path):
        for offset in range(file.stat().st_size):
            with flipped(file, offset, mask), pytest.raises(JournalError) as raised:
                EditJournal.open(tmp_path, genesis=GENESIS)
            named = re.search(rf"{file} is damaged at byte (\d+) \((step \d+|the header|after step \d+)\)", str(raised.value))
            assert named is not None, (file.name, offset, str(raised.value))
            assert int(named[1]) <= offset
            if file == segments(tmp_path)[0] and sizes[0] <= offset < sizes[-1]:
                assert named[2] == f"step {sum(size <= offset for size in sizes) + 1}"


@pytest.fixture(scope="module")
def journal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journal")
    fill(folder, 2)
    fill(folder, 4)
    return folder


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segment=st.integers(0, 1), position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_other_value_of_any_byte_is_detected(journal_folder: Path, segment: int, position: float, mask: int) -> None:
    file = segments(journal_folder)[segment]
    offset = int(position * file.stat().st_size)
    with flipped(file, offset, mask), pytest.raises(JournalError, match="is damaged at byte"):
        EditJournal.open(journal_folder, genesis=GENESIS)


def test_a_byte_that_flips_after_opening_is_detected_when_it_is_read(tmp_path: Path) -> None:
    sizes = sizes_after_each_step(tmp_path)
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    file = segments(tmp_path)[0]
    assert journal.entry(1).step == 1
    with flipped(file, sizes[1] - 50, 4), pytest.raises(JournalError, match=rf"damaged at byte {sizes[0]} \(step 2\)"):
        journal.entry(2)


def test_an_older_segment_cut_short_is_named(tmp_path: Path) -> None:
    sizes = sizes_after_each_step(tmp_path)
    fill(tmp_path, STEPS + 1)
    first = segments(tmp_path)[0]
    first.write_bytes(first.read_bytes()[: sizes[-1] - 1])
    with pytest.raises(JournalError, match=rf"segment-000001.journal is cut short at byte {sizes[-2]} \(step 3\)"):
        EditJournal.open(tmp_path, genesis=GENESIS)


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        fill(tmp_path, steps)
    segments(tmp_path)[1].unlink()
    with pytest.raises(JournalError, match="builds on segment 2, which is missing"):
        EditJournal.open(tmp_path, genesis=GENESIS)


def test_a_segment_under_another_name_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    shutil.copy(segments(tmp_path)[0], tmp_path / "segment-000002.journal")
    with pytest.raises(JournalError, match=r"was written as segment 1; give it its name back"):
        EditJournal.open(tmp_path, genesis=GENESIS)


def test_segments_of_two_histories_do_not_mix(tmp_path: Path) -> None:
    fill(tmp_path / "one", 2)
    with EditJournal.open(tmp_path / "two", genesis=GENESIS) as journal:
        for step in (1, 2):
            record(journal, step, author="other")
    fill(tmp_path / "two", 3)
    shutil.copy(segments(tmp_path / "two")[1], tmp_path / "one")
    with pytest.raises(JournalError, match="builds on state"):
        EditJournal.open(tmp_path / "one", genesis=GENESIS)


def test_what_the_message_says_to_do_works(tmp_path: Path) -> None:
    states = fill(tmp_path / "unbroken", STEPS)
    sizes = sizes_after_each_step(tmp_path / "bad")
    file = segments(tmp_path / "bad")[0]
    with flipped(file, sizes[1] + 3, 1), pytest.raises(JournalError, match=f"truncate -s {sizes[1]} {file}"):
        EditJournal.open(tmp_path / "bad", genesis=GENESIS)
    os.truncate(file, sizes[1])
    assert fill(tmp_path / "bad", STEPS) == states
