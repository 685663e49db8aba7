"""The journal: every edit of a trajectory, in order, on disk, as a hash chain.

A folder of segment files. A writer appends only to a segment that it created itself (exclusively: numbers are never shared), and
the newest segment with a header decides: it names the segment and the state that it builds on, and so on down to the first.
Nothing is locked, renamed, overwritten or deleted, so the journal lives on network file systems too.

Two writers. A newer segment fences the older: its creator makes the file *first*, then reads what the others wrote, then writes
the header that says how much of it stands; a writer that finds a newer file *after* its own write does not count the edit as
written before it has looked again. So an edit that `append` returned is never lost to another writer, as long as the file
system shows a new file to everybody at once; where it does not (NFS caches folders), the loser learns of it by `JournalDiverged`.
Whoever opens a journal that another process is writing waits for that process's edits instead of fencing it.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from editeval.edits.chain import Chain
from editeval.edits.delta import Edit
from editeval.edits.encoding import EncodedEdit, encode
from editeval.edits.owner import Owner
from editeval.edits.segment import JournalEntry, Segment, SegmentHeader, genesis_digest
from editeval.edits.writer import SegmentWriter
from editeval.types import JournalError

__all__ = ["EditJournal", "JournalDiverged", "JournalEntry"]

FOLLOW_SECONDS = 30.0
HEADER_SECONDS = 0.25  # between creating a segment and writing its header lies one reading of the journal
POLL_SECONDS = 0.02


class JournalDiverged(JournalError):  # noqa: N818 - named for what happened
    """Edits that this journal had handed out were superseded by others; restore the model and replay from the journal."""


@dataclass
class _Patience:
    """How long nothing has moved, by the local monotonic clock alone."""

    seen: object = None
    since: float = 0.0

    def still_for(self, state: object) -> float:
        """Return the seconds since `state` last changed."""
        now = time.monotonic()
        if state != self.seen:
            self.seen, self.since = state, now
        return now - self.since


class EditJournal:
    """An append-only log of edits. `len(journal)` edits are known to the caller; others' appear by `refresh` and `append`.

    Opening and reading never write, so a read-only folder can be replayed.
    """

    def __init__(self, folder: Path, *, genesis: str, follow_seconds: float = FOLLOW_SECONDS) -> None:
        """Know nothing yet; use `open`."""
        self.folder = folder
        self.genesis = genesis
        self._follow_seconds = follow_seconds
        self._token = secrets.token_hex(8)
        self._chain = Chain(folder, genesis=genesis)
        self._writer: SegmentWriter | None = None
        self._length = 0
        self._head = genesis_digest(genesis)
        self._closed = False

    @classmethod
    def open(cls, folder: Path, *, genesis: str, follow_seconds: float = FOLLOW_SECONDS) -> Self:
        """Return the journal of the trajectory `genesis` (its content key, hex) in `folder`, every byte checked.

        `follow_seconds` is how long `append` waits for another process that is writing here, after that process's last sign of life.

        Raises:
            JournalError: the folder holds another trajectory, or a byte is not what was written.
        """
        journal = cls(folder, genesis=genesis, follow_seconds=follow_seconds)
        journal.refresh()
        return journal

    def __len__(self) -> int:
        return self._length

    @property
    def head(self) -> str:
        """The state (hex) after all edits."""
        return self._head

    def digest_at(self, step: int) -> str:
        """Return the state (hex) after `step` edits; 0 is the unedited model's.

        Raises:
            JournalError: the journal is shorter.
        """
        self._check_step(step, first=0)
        return self._chain.digest_at(step)

    def entry(self, step: int) -> JournalEntry:
        """Return the edit number `step`, from 1 to `len(journal)`.

        Raises:
            JournalError: there is none, or its bytes are damaged.
        """
        self._check_step(step, first=1)
        return next(self._chain.read(range(step, step + 1)))

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[JournalEntry]:
        """Iterate over the edits after the first `start`, up to and including number `stop` (default: the last).

        Raises:
            JournalError: the journal is shorter, or bytes are damaged.
        """
        stop = self._length if stop is None else stop
        self._check_step(start, first=0)
        self._check_step(stop, first=0)
        return self._chain.read(range(start + 1, stop + 1))

    def append(self, request_ids: Sequence[str], edit: Edit, seconds: float) -> JournalEntry:
        """Record edit number `len(journal) + 1` and return the entry that stands there: this one, or another writer's.

        What is returned has been read back from the disk (diagnostics are not kept), so a live run applies the very
        bytes that a resumed one will. `seconds` is how long computing took; it is stored but not part of the digest.

        Raises:
            JournalDiverged: an edit that this journal had handed out no longer stands; restore the model and replay.
            JournalError: another writer's edit at this step is about other requests; the disk is full; a byte is damaged.
        """
        if self._closed:
            raise JournalError(f"the journal in {self.folder} is closed; open it again to append")
        ids = tuple(request_ids)
        encoded = encode(edit)
        step = self._length + 1
        patience = _Patience()
        if not self._owns_head():
            self._rescan()
        while self._chain.last_step < step or not self._chain.settled:
            if self._owns_head():
                self._write(ids, encoded, seconds)
            elif self._should_follow(patience):
                time.sleep(POLL_SECONDS)
                self._rescan()
            else:
                self._claim()
        entry = next(self._chain.read(range(step, step + 1)))
        if entry.request_ids != ids:
            raise JournalError(
                f"step {step} in {self.folder} is about {list(entry.request_ids)}, the edit to record is about {list(ids)}; "
                "another run with the same genesis edits in another order: make what sets the order part of the genesis"
            )
        self._set_view(step)
        return entry

    def refresh(self) -> None:
        """Adopt what others wrote.

        Raises:
            JournalDiverged: an edit that this journal had handed out no longer stands; restore the model and replay.
            JournalError: a byte is damaged.
        """
        self._rescan()
        patience = _Patience()
        while not self._chain.settled and self._should_follow(patience):
            time.sleep(POLL_SECONDS)
            self._rescan()
        self._set_view(self._chain.last_step)

    def close(self) -> None:
        """Stop writing and tell waiting processes so. Reading goes on to work; may be called twice."""
        writer, self._writer = self._writer, None
        self._closed = True
        if writer is not None and writer.pid == os.getpid():
            with suppress(JournalError):  # the mark only spares others a wait
                writer.write_end()
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _set_view(self, length: int) -> None:
        self._length = length
        self._head = self._chain.digest_at(length)

    def _check_step(self, step: int, *, first: int) -> None:
        if not first <= step <= self._length:
            raise JournalError(f"step {step} not in {first}..{self._length} of the journal in {self.folder}; edit further, or ask for less")

    def _rescan(self) -> None:
        """Learn what is on disk; raises JournalDiverged when edits that were handed out no longer stand."""
        self._chain.rescan()
        if self._chain.last_step >= self._length and self._chain.digest_at(self._length) == self._head:
            return
        had = self._length
        self._set_view(self._chain.last_step)
        raise JournalDiverged(
            f"the first {had} edits of {self.folder} are no longer those that this process had seen: another process replaced some; "
            "restore the model and replay the journal"
        )

    def _owns_head(self) -> bool:
        """Whether this journal writes the newest segment; lets go of its writer where that is over."""
        if self._writer is None:
            return False
        newest, own = self._chain.newest_epoch(), self._writer.segment
        if newest == own.epoch and self._writer.pid == os.getpid():
            return True
        self._drop_writer()
        if newest < own.epoch:
            raise JournalError(f"{own.path} was removed while it was written; put it back, then start the same run again")
        return False

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write(self, request_ids: Sequence[str], edit: EncodedEdit, seconds: float) -> None:
        """Write the edit after the last."""
        if self._writer is None:
            return
        try:
            self._writer.write_edit(request_ids, edit, seconds)
        except BaseException:
            self._drop_writer()  # its file may end in part of a frame, so nothing may follow
            raise
        self._look_again()

    def _look_again(self) -> None:
        """After a write: what was written stands if no newer segment is there; else what stands is read anew."""
        if not self._owns_head():
            self._rescan()

    def _should_follow(self, patience: _Patience) -> bool:
        """Whether to wait for another writer: one that may be at work, and has moved within `follow_seconds`."""
        newest = self._chain.newest_epoch()
        head = self._chain.head
        if newest > (head.epoch if head else 0):
            # its creator is about to write the header, or was killed; two that wait for each other must not wake together
            return patience.still_for(newest) < random.SystemRandom().uniform(HEADER_SECONDS / 2, HEADER_SECONDS)
        if head is None or head.header is None or head.ended or not head.header.owner.may_write(token=self._token):
            return False
        return patience.still_for((newest, head.path.stat().st_size)) < self._follow_seconds

    def _claim(self) -> None:
        """Create the next segment and build on all that stands; do nothing when another writer was first."""
        epoch = self._chain.newest_epoch() + 1
        segment = Segment(self._chain.path(epoch), epoch=epoch)
        try:
            writer = SegmentWriter(segment)
        except FileExistsError:
            self._rescan()
            return
        try:
            self._rescan()  # after creating the file: whatever others may count as written is on disk by now
            if self._chain.newest_epoch() > epoch:  # another writer overtook this one before it had begun
                writer.close()
                return
            writer.write_header(self._next_header(epoch))
        except BaseException:
            writer.close()
            raise
        self._chain.extend(segment)
        self._writer = writer
        self._look_again()

    def _next_header(self, epoch: int) -> SegmentHeader:
        return SegmentHeader(
            genesis=self.genesis,
            epoch=epoch,
            base=self._chain.head.epoch if self._chain.head else 0,
            first_step=self._chain.last_step + 1,
            parent=self._chain.digest_at(self._chain.last_step),
            owner=Owner.current(token=self._token),
        )
