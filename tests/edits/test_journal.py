"""One writer: what is recorded, in which order, under which name, and how much room it takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from editeval.edits.delta import DenseDelta, LowRankDelta
from editeval.edits.journal import EditJournal
from editeval.types import JournalError
from tests.edits.writers import GENESIS, fill, make_edit, make_mixed_edit, record, request_ids, segments

# sha256 chain of the four edits of `test_digests_never_change`, as first computed by this code: a refactor must not move it,
# or every journal that exists is worthless
GOLDEN_HEAD = "370c23e8928d685cb4347af4190d6684606ef6bc57cc51b1bb0af49a205b605f"


def test_an_empty_journal_is_the_genesis_and_writes_nothing(tmp_path: Path) -> None:
    journal = EditJournal.open(tmp_path / "journal", genesis=GENESIS)
    other = EditJournal.open(tmp_path / "other", genesis="0" * 64)
    assert len(journal) == 0
    assert journal.head == journal.digest_at(0) != other.head
    assert list(journal.entries()) == []
    assert not journal.folder.exists()


def test_entries_come_back_in_order_and_form_a_chain(tmp_path: Path) -> None:
    with EditJournal.open(tmp_path, genesis=GENESIS) as journal:
        written = [record(journal, step) for step in range(1, 6)]
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    assert len(journal) == 5
    read = list(journal.entries())
    assert [entry.step for entry in read] == [1, 2, 3, 4, 5]
    assert [entry.digest for entry in read] == [entry.digest for entry in written]
    assert [entry.parent for entry in read] == [journal.digest_at(step) for step in range(5)]
    assert read[-1].digest == journal.head
    assert [entry.step for entry in journal.entries(2, 4)] == [3, 4]
    assert (journal.entry(3).request_ids, journal.entry(3).seconds) == (request_ids(3), 0.25)


def test_append_returns_what_is_on_the_disk(tmp_path: Path) -> None:
    edit = make_mixed_edit(4)
    with EditJournal.open(tmp_path, genesis=GENESIS) as journal:
        live = journal.append(["a", "b"], edit, 1.0)
    replayed = EditJournal.open(tmp_path, genesis=GENESIS).entry(1)
    for entry in (live, replayed):
        low_rank, dense = entry.edit.deltas
        assert isinstance(low_rank, LowRankDelta)
        assert isinstance(dense, DenseDelta)
        assert torch.equal(low_rank.left, edit.deltas[0].left)  # type: ignore[union-attr]
        assert torch.equal(dense.value, edit.deltas[1].value)  # type: ignore[union-attr]
        assert torch.equal(entry.edit.auxiliary["keys"], torch.arange(4))
        assert torch.equal(entry.edit.auxiliary["count"], torch.tensor(4))
        assert entry.request_ids == ("a", "b")
        assert entry.edit.diagnostics == {}
    assert live.digest == replayed.digest


def test_the_digest_names_everything_but_the_seconds(tmp_path: Path) -> None:
    edit = make_edit(1)
    (delta,) = edit.deltas
    assert isinstance(delta, LowRankDelta)
    variants = {
        "same": (("x",), delta, 1.0),
        "seconds": (("x",), delta, 2.0),
        "ids": (("y",), delta, 1.0),
        "two ids": (("x", "x"), delta, 1.0),
        "parameter": (("x",), LowRankDelta(parameter="w", left=delta.left, right=delta.right), 1.0),
        "value": (("x",), LowRankDelta(parameter=delta.parameter, left=delta.left + 1e-7, right=delta.right), 1.0),
        "shape": (("x",), LowRankDelta(parameter=delta.parameter, left=delta.left.T, right=delta.right.T), 1.0),
        "dtype": (("x",), LowRankDelta(parameter=delta.parameter, left=delta.left.view(torch.int32), right=delta.right), 1.0),
    }
    digests = {}
    for name, (ids, changed, seconds) in variants.items():
        with EditJournal.open(tmp_path / name, genesis=GENESIS) as journal:
            digests[name] = journal.append(ids, type(edit)(deltas=(changed,)), seconds).digest
    assert digests["seconds"] == digests["same"]
    assert len(set(digests.values())) == len(digests) - 1


def test_digests_never_change(tmp_path: Path) -> None:
    with EditJournal.open(tmp_path, genesis=GENESIS) as journal:
        for step in range(1, 5):
            delta = LowRankDelta(parameter="w", left=torch.full((2, 1), float(step)), right=torch.arange(3.0).reshape(1, 3))
            journal.append([f"é{step}"], type(make_edit(1))(deltas=(delta,), auxiliary={"k": torch.tensor([step])}), 0.0)
    assert journal.head == GOLDEN_HEAD


def test_a_run_in_many_pieces_equals_an_unbroken_run(tmp_path: Path) -> None:
    unbroken = fill(tmp_path / "unbroken", 9)
    for steps in (1, 1, 4, 5, 9):
        in_pieces = fill(tmp_path / "pieces", steps)
    assert in_pieces == unbroken
    journal = EditJournal.open(tmp_path / "pieces", genesis=GENESIS)
    assert [entry.digest for entry in journal.entries()] == unbroken[1:]
    assert [entry.step for entry in journal.entries(3, 8)] == [4, 5, 6, 7, 8]
    assert len(segments(tmp_path / "pieces")) == 4  # one for each piece that wrote


def test_an_open_journal_sees_what_others_wrote_after_refresh(tmp_path: Path) -> None:
    reader = EditJournal.open(tmp_path, genesis=GENESIS)
    states = fill(tmp_path, 3)
    assert len(reader) == 0
    reader.refresh()
    assert (len(reader), reader.head) == (3, states[3])


def test_append_goes_on_where_its_caller_stands_although_others_are_further(tmp_path: Path) -> None:
    behind = EditJournal.open(tmp_path, genesis=GENESIS)
    states = fill(tmp_path, 3)
    for step in (1, 2, 3, 4):
        entry = record(behind, step)
        assert (entry.step, len(behind), behind.head) == (step, step, entry.digest)
    assert [behind.digest_at(step) for step in range(4)] == states
    behind.close()


def test_a_journal_of_another_trajectory_is_refused_naming_both(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(JournalError, match=f"{GENESIS}, not to {'0' * 64}"):
        EditJournal.open(tmp_path, genesis="0" * 64)


def test_an_adopted_edit_about_other_requests_is_refused_naming_both(tmp_path: Path) -> None:
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    fill(tmp_path, 1)
    with pytest.raises(JournalError, match=r"\['fact-1'\], the edit to record is about \['other'\]"):
        journal.append(["other"], make_edit(1), 0.0)
    assert len(journal) == 0


@pytest.mark.parametrize("step", [0, 4, -1])
def test_a_step_that_is_not_there_is_refused_with_what_is(tmp_path: Path, step: int) -> None:
    fill(tmp_path, 3)
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    with pytest.raises(JournalError, match=rf"step {step} not in 1\.\.3"):
        journal.entry(step)
    with pytest.raises(JournalError, match=r"step 4 not in 0\.\.3"):
        journal.entries(0, 4)


def test_a_closed_journal_reads_but_does_not_write(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    journal = EditJournal.open(tmp_path, genesis=GENESIS)
    journal.close()
    journal.close()
    assert journal.entry(2).step == 2
    with pytest.raises(JournalError, match="is closed; open it again"):
        record(journal, 3)


def test_ten_thousand_edits_are_one_file_of_at_most_a_tenth_more_than_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what reaches the platter is not the claim here
    count, d_out, d_in = 10_000, 64, 256
    edit = make_edit(1, d_out=d_out, d_in=d_in)
    with EditJournal.open(tmp_path, genesis=GENESIS) as journal:
        for step in range(1, count + 1):
            journal.append([f"counterfact-{step}"], edit, 12.5)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size <= 1.1 * 4 * count * (d_out + d_in)
    again = EditJournal.open(tmp_path, genesis=GENESIS)
    assert (len(again), again.head) == (count, journal.head)
    assert sum(1 for _ in again.entries()) == count
