"""A writer that ends at any instant, or whose disk fails, costs at most the edit in flight."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from editeval.edits.journal import EditJournal
from editeval.types import JournalError
from tests.edits.writers import GENESIS, acknowledged_digests, fill, record, segments, start_writer

KILLS = 20


class _KilledError(BaseException):
    """Stands for SIGKILL: nothing of the writer may run afterwards."""


def killed_before_call(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the process die before the call number `number` that reaches the disk; return a function that tells how many were made."""
    calls = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise _KilledError
            return function(*arguments, **options)

        return call

    for name in ("open", "write", "fsync"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return lambda: calls


def test_a_writer_that_ends_before_any_call_to_the_disk_loses_nothing_that_it_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = fill(tmp_path / "unbroken", 4)
    number, finished = 0, False
    while not finished:
        number += 1
        folder, returned = tmp_path / f"killed-{number}", 0
        journal = EditJournal.open(folder, genesis=GENESIS)
        with monkeypatch.context() as patch:
            killed_before_call(number, patch)
            try:
                for step in (1, 2, 3):
                    record(journal, step)
                    returned = step
                finished = True
            except _KilledError:
                pass
        again = EditJournal.open(folder, genesis=GENESIS)
        assert len(again) >= returned
        assert again.head == unbroken[len(again)]
        assert fill(folder, 4) == unbroken
    assert number > 10


def test_a_run_killed_at_random_instants_ends_in_the_state_of_an_unbroken_run(tmp_path: Path) -> None:
    steps, instants = 400, random.Random(7)
    folder = tmp_path / "killed"
    known: dict[int, str] = {}
    for kill in range(KILLS):
        notes = tmp_path / f"notes-{kill}"
        process = start_writer(folder, notes, author="", steps=steps, follow_seconds=600.0)
        # Some die while they open the journal, some after edits of their own, however slow the machine is.
        noted = instants.choice((0, 0, 1, 4))
        while not (notes.exists() and len(acknowledged_digests(notes)) >= noted) and process.is_alive():
            time.sleep(0.005)
        time.sleep(instants.uniform(0.0, 0.06))
        process.kill()
        process.join()
        known |= acknowledged_digests(notes)
        journal = EditJournal.open(folder, genesis=GENESIS)
        assert {step: journal.digest_at(step) for step in known} == known
    assert known
    reached = len(journal)
    assert fill(folder, reached + 3) == fill(tmp_path / "unbroken", reached + 3)


def record_all(journal: EditJournal, steps: Iterable[int]) -> None:
    for step in steps:
        record(journal, step)


def full_after(allowed: int) -> Callable[[int, Any], int]:
    """Return an `os.write` to a disk with room for `allowed` bytes."""
    write, room = os.write, allowed

    def writing(descriptor: int, data: Any) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, memoryview(data)[:room])
        room -= written
        return written

    return writing


def test_a_full_disk_costs_only_the_edit_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = fill(tmp_path / "unbroken", 4)
    for room in range(0, 200, 9):
        folder = tmp_path / f"full-{room}"
        journal = EditJournal.open(folder, genesis=GENESIS)
        record(journal, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_after(room))
            with pytest.raises(JournalError, match="No space left on device; every earlier edit is intact: free some space"):
                record_all(journal, (2, 3))
        held = len(journal)
        assert journal.head == unbroken[held]
        assert EditJournal.open(folder, genesis=GENESIS).head == unbroken[held]
        for step in range(held + 1, 4):  # the same journal goes on once there is room
            assert record(journal, step).digest == unbroken[step]
        assert fill(folder, 4) == unbroken  # and so does a new one


def test_a_disk_that_is_full_from_the_start_is_reported_and_later_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = fill(tmp_path / "unbroken", 2)
    for room in (0, 1, 40, 300):
        folder = tmp_path / f"full-{room}"
        with monkeypatch.context() as patch, EditJournal.open(folder, genesis=GENESIS) as journal:
            patch.setattr(os, "write", full_after(room))
            with pytest.raises(JournalError, match="No space left"):
                record(journal, 1)
        assert fill(folder, 2) == unbroken


def test_a_flush_that_fails_is_an_error_and_the_edit_can_be_recorded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    unbroken = fill(tmp_path / "unbroken", 3)
    journal = EditJournal.open(tmp_path / "failing", genesis=GENESIS)
    record(journal, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(JournalError, match="see to the disk"):
            record(journal, 2)
    assert len(journal) == 1
    assert [record(journal, step).digest for step in (2, 3)] == unbroken[2:]
    journal.close()


def test_a_read_only_folder_can_be_read_and_says_that_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 2)
    create = os.open

    def refusing(path: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return create(path, flags, *arguments)

    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    assert [entry.step for entry in journal.entries()] == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        with pytest.raises(JournalError, match="make the folder writable"):
            record(journal, 3)


def test_a_file_that_something_else_changed_is_not_written_further(tmp_path: Path) -> None:
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    record(journal, 1)
    with segments(tmp_path)[0].open("ab") as file:
        file.write(b"x")
    with pytest.raises(JournalError, match="something else changed it"):
        record(journal, 2)


def test_a_file_that_was_removed_is_not_written_further(tmp_path: Path) -> None:
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    record(journal, 1)
    segments(tmp_path)[0].unlink()
    with pytest.raises(JournalError, match="was removed while it was written"):
        record(journal, 2)
