"""Several writers on one folder: one history, every step once, and the later adopts what the earlier wrote."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path

import pytest

from editeval.edits import owner
from editeval.edits.journal import EditJournal, JournalDiverged
from tests.edits.writers import GENESIS, acknowledged_digests, fill, record, segments, start_writer, start_writers

LONG = 600.0  # a wait that would time the test out


def assert_one_history(folder: Path, notes: list[Path], steps: int) -> None:
    journal = EditJournal.open(folder, genesis=GENESIS)
    history = {entry.step: entry.digest for entry in journal.entries()}
    assert list(history) == list(range(1, steps + 1))
    for path in notes:
        assert acknowledged_digests(path) == history


def test_two_processes_share_one_history_although_they_compute_different_edits(tmp_path: Path) -> None:
    folder, notes = tmp_path / "journal", [tmp_path / "a", tmp_path / "b"]
    for process in start_writers(folder, notes, steps=40, follow_seconds=LONG):
        process.join(LONG / 5)
        assert process.exitcode == 0
    assert_one_history(folder, notes, 40)
    assert len(segments(folder)) <= 3  # the second followed; it did not fence the first at every step


def test_writers_that_never_wait_for_each_other_still_share_one_history(tmp_path: Path) -> None:
    folder, notes = tmp_path / "journal", [tmp_path / name for name in "abc"]
    for process in start_writers(folder, notes, steps=15, follow_seconds=0.0):
        process.join(LONG / 5)
        assert process.exitcode == 0
    assert_one_history(folder, notes, 15)


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_writer_is_replaced_at_once(tmp_path: Path, reaped: bool) -> None:
    folder, notes = tmp_path / "journal", tmp_path / "notes"
    process = start_writer(folder, notes, author="", steps=3, follow_seconds=LONG, idle=True)
    while len(acknowledged_digests(notes)) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    if reaped:
        process.join()
    journal = EditJournal.open(folder, genesis=GENESIS, follow_seconds=LONG)
    assert record(journal, 4).digest == fill(tmp_path / "unbroken", 4)[4]
    journal.close()
    process.join()


def test_an_idle_writer_is_waited_for_and_then_replaced(tmp_path: Path) -> None:
    folder, notes = tmp_path / "journal", tmp_path / "notes"
    process = start_writer(folder, notes, author="", steps=3, follow_seconds=LONG, idle=True)
    while len(acknowledged_digests(notes)) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    started = time.monotonic()
    with EditJournal.open(folder, genesis=GENESIS, follow_seconds=0.3) as journal:
        record(journal, 4)
    assert time.monotonic() - started >= 0.3
    process.kill()
    process.join()


def test_a_closed_journal_is_continued_at_once_even_from_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2)
    monkeypatch.setattr(owner, "_machine", lambda: "elsewhere")
    with EditJournal.open(tmp_path, genesis=GENESIS, follow_seconds=LONG) as journal:
        assert record(journal, 3).step == 3


def test_a_writer_on_another_machine_is_given_time_to_show_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2, close=False)
    monkeypatch.setattr(owner, "_machine", lambda: "elsewhere")
    started = time.monotonic()
    with EditJournal.open(tmp_path, genesis=GENESIS, follow_seconds=0.2) as journal:
        record(journal, 3)
    assert time.monotonic() - started >= 0.2


def test_two_journals_of_one_thread_take_turns_without_waiting(tmp_path: Path) -> None:
    one = EditJournal.open(tmp_path, genesis=GENESIS, follow_seconds=LONG)
    other = EditJournal.open(tmp_path, genesis=GENESIS, follow_seconds=LONG)
    record(one, 1, author="one")
    for step in (1, 2, 3):
        record(other, step, author="other")
    for step in (2, 3, 4):
        record(one, step, author="one")
    other.refresh()
    assert (len(other), other.head) == (4, one.head)
    one.close()
    other.close()


def test_a_forked_child_does_not_write_into_its_parents_file(tmp_path: Path) -> None:
    journal = EditJournal.open(tmp_path, genesis=GENESIS, follow_seconds=0.05)
    record(journal, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of forks in a process with threads
        child = os.fork()
    if child == 0:
        try:
            record(journal, 2, author="child")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert len(segments(tmp_path)) == 2
    entry = record(journal, 2, author="parent")
    assert record(journal, 3).parent == entry.digest
    assert EditJournal.open(tmp_path, genesis=GENESIS).head == journal.head
    journal.close()


def test_a_file_whose_creator_died_before_its_header_holds_nothing_up(tmp_path: Path) -> None:
    states = fill(tmp_path / "unbroken", 4)
    fill(tmp_path / "journal", 2)
    (tmp_path / "journal" / "segment-000002.journal").touch()
    assert fill(tmp_path / "journal", 4) == states
    assert [path.name for path in segments(tmp_path / "journal")][-1] == "segment-000003.journal"


def test_an_edit_that_others_replaced_after_it_was_handed_out_is_told(tmp_path: Path) -> None:
    """On a file system that shows new files late, a writer can miss that it was fenced; here the new file comes by hand."""
    behind = EditJournal.open(tmp_path / "journal", genesis=GENESIS)
    record(behind, 1)
    shutil.copytree(tmp_path / "journal", tmp_path / "elsewhere")
    record(behind, 2)
    record(behind, 3)
    ahead = EditJournal.open(tmp_path / "elsewhere", genesis=GENESIS)
    record(ahead, 2, author="ahead")
    shutil.copy(segments(tmp_path / "elsewhere")[1], tmp_path / "journal")
    with pytest.raises(JournalDiverged, match=r"the first 3 edits .* restore the model and replay"):
        record(behind, 4)
    assert (len(behind), behind.head) == (2, ahead.head)
    assert record(behind, 3).parent == ahead.head
    behind.close()
    ahead.close()
