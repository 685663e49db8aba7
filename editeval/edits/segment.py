"""A segment: one file of the journal, written by one writer that created it and never touched by another.

It starts with a header that says on which state of which earlier segment it builds, then holds edits one after another, and
an end mark where its writer closed it. A segment checks by itself from the first byte to the last.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from editeval.edits.delta import Edit
from editeval.edits.encoding import Layout
from editeval.edits.frames import Frame, FrameDamageError, FrameKind, Prefix, pack_frame, read_frame
from editeval.edits.owner import Owner
from editeval.types import JournalError

FORMAT = 1
CHAIN_SEED = b"editeval edit 1\0"
SIZE = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True, eq=False)
class JournalEntry:
    """One recorded edit. `digest` names the state after it, `parent` the state before; `seconds` is in neither."""

    step: int
    request_ids: tuple[str, ...]
    edit: Edit
    seconds: float
    parent: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class SegmentHeader:
    """Where a segment stands: it continues segment `base` (0: none) after `first_step - 1` edits, in the state `parent`."""

    genesis: str
    epoch: int
    base: int
    first_step: int
    parent: str
    owner: Owner

    def pack(self) -> bytes:
        """Return the header's frame."""
        body = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()
        return pack_plain(FrameKind.HEADER, body)

    @classmethod
    def parse(cls, body: bytes) -> SegmentHeader:
        """Return the header in a frame's body; raises FrameDamageError for a format of another version."""
        values = json.loads(body)
        written = values.pop("format")
        if written != FORMAT:
            raise FrameDamageError(f"the journal has format {written}, this version reads format {FORMAT}")
        return cls(owner=Owner(**values.pop("owner")), **values)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an edit lies in its file (bytes), and the state after it."""

    offset: int
    size: int
    digest: bytes


class Segment:
    """What is known of one file; `scan` learns what was appended since. A file without a whole header holds nothing."""

    def __init__(self, path: Path, *, epoch: int) -> None:
        self.path = path
        self.epoch = epoch
        self.header: SegmentHeader | None = None
        self.ended = False
        self.end = 0
        self._slots: list[Slot] = []
        self._layouts: list[Layout] = []
        self._layout_numbers: dict[bytes, int] = {}

    @property
    def first_step(self) -> int:
        """The first step that the segment holds or will hold."""
        return self._known_header().first_step

    @property
    def last_step(self) -> int:
        """The last step that it holds; `first_step - 1` when none."""
        return self.first_step - 1 + len(self._slots)

    def digest_at(self, step: int) -> str:
        """Return the state (hex) after `step`, which is from `first_step - 1` to `last_step`."""
        return self.parent_of(step + 1).hex()

    def scan(self, *, genesis: str) -> None:
        """Check and index every frame that was completed since the last scan, without keeping any tensor.

        Raises:
            JournalError: a byte is not what was written (names file, offset and step), or the file is of another genesis.
        """
        with self.path.open("rb", buffering=1 << 20) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(self.end)
            while (frame := self._read_frame(file, size, keep_edits=False)) is not None:
                self._take(frame)
        if self.header is not None and self.header.genesis != genesis:
            raise JournalError(f"{self.path} belongs to the trajectory {self.header.genesis}, not to {genesis}; choose another folder")

    def read(self, steps: range) -> Iterator[JournalEntry]:
        """Yield the entries of these steps, each checked again.

        Raises:
            JournalError: a byte is not what was written; names file, offset and step.
        """
        with self.path.open("rb", buffering=1 << 20) as file:
            size = os.fstat(file.fileno()).st_size
            for step in steps:
                slot = self._slots[step - self.first_step]
                file.seek(slot.offset)
                frame = self._read_frame(file, size, keep_edits=True, step=step)
                if frame is None or frame.digest != slot.digest:
                    raise self._damage(slot.offset, step, "the edit that stood here is gone; the file was changed by something else")
                yield self._decode(step, frame)

    def begin(self, header: SegmentHeader, *, size: int) -> None:
        """Note the header, whose frame of `size` bytes is the whole file now."""
        self.header = header
        self.end = size

    def layout_number(self, text: bytes) -> int | None:
        """Return the number of the layout that reads `text`, None when the segment does not hold it yet."""
        return self._layout_numbers.get(text)

    def note_layout(self, text: bytes, *, size: int) -> int:
        """Note the layout whose frame of `size` bytes ends the file now, and return its number."""
        self._layout_numbers[text] = len(self._layouts)
        self._layouts.append(Layout.parse(text))
        self.end += size
        return len(self._layouts) - 1

    def note_edit(self, digest: bytes, *, size: int) -> None:
        """Note the edit whose frame of `size` bytes ends the file now."""
        self._slots.append(Slot(self.end, size, digest))
        self.end += size

    def parent_of(self, step: int) -> bytes:
        """Return the digest that edit `step` builds on; `step` is from `first_step` to `last_step + 1`."""
        position = step - self.first_step
        return self._slots[position - 1].digest if position else bytes.fromhex(self._known_header().parent)

    def _known_header(self) -> SegmentHeader:
        if self.header is None:
            raise JournalError(f"{self.path} has no header yet; wait for its writer or open the journal again")
        return self.header

    def _read_frame(self, file: BinaryIO, size: int, *, keep_edits: bool, step: int | None = None) -> Frame | None:
        offset = file.tell()
        expected = step if step is not None else self.last_step + 1 if self.header else None

        def seed(prefix: Prefix) -> bytes:
            if prefix.kind is not FrameKind.EDIT:
                return bytes([prefix.kind])
            if expected is None or prefix.layout >= len(self._layouts):
                raise FrameDamageError(f"an edit refers to layout {prefix.layout} of {len(self._layouts)}")
            return edit_seed(self.parent_of(expected), self._layouts[prefix.layout].text, prefix.ids_size)

        try:
            return read_frame(file, size=size, seed=seed, keep_edits=keep_edits)
        except FrameDamageError as error:
            raise self._damage(offset, expected, str(error)) from error

    def _take(self, frame: Frame) -> None:
        """Index a frame that checked; raises JournalError where it stands in the wrong place."""
        kind, size = frame.prefix.kind, frame.prefix.frame_size
        if self.ended or (kind is FrameKind.HEADER) != (self.header is None):
            raise self._damage(self.end, None, f"a frame {kind.name} stands where it must not; the file was put together from others")
        if kind is FrameKind.HEADER:
            try:
                header = SegmentHeader.parse(frame.body)
            except FrameDamageError as error:
                raise self._damage(self.end, None, str(error)) from error
            if header.epoch != self.epoch:
                raise self._damage(self.end, None, f"the file was written as segment {header.epoch}; give it its name back")
            self.begin(header, size=size)
        elif kind is FrameKind.LAYOUT:
            self.note_layout(frame.body, size=size)
        elif kind is FrameKind.EDIT:
            self.note_edit(frame.digest, size=size)
        else:
            self.ended = True
            self.end += size

    def _decode(self, step: int, frame: Frame) -> JournalEntry:
        ids_size = frame.prefix.ids_size
        return JournalEntry(
            step=step,
            request_ids=tuple(json.loads(frame.body[:ids_size])),
            edit=self._layouts[frame.prefix.layout].decode(memoryview(frame.body)[ids_size:]),
            seconds=frame.prefix.seconds,
            parent=self.parent_of(step).hex(),
            digest=frame.digest.hex(),
        )

    def _damage(self, offset: int, step: int | None, reason: str) -> JournalError:
        where = f"step {step}" if step is not None else "the header" if self.header is None else f"after step {self.last_step}"
        return JournalError(
            f"{self.path} is damaged at byte {offset} ({where}): {reason}. "
            f"Put the file back from a copy; or drop everything from here on: `truncate -s {offset} {self.path}`, and remove "
            "segments of higher number (the edits are then computed again)"
        )


def genesis_digest(genesis: str) -> str:
    """Return the state (hex) of a journal without edits."""
    return hashlib.sha256(b"editeval genesis 1\0" + genesis.encode()).hexdigest()


def edit_seed(parent: bytes, layout: bytes, ids_size: int) -> bytes:
    """Return what an edit's digest starts from, so that it covers the state before, and sizes that make the body unambiguous."""
    return CHAIN_SEED + parent + SIZE.pack(len(layout)) + layout + SIZE.pack(ids_size)


def pack_plain(kind: FrameKind, body: bytes) -> bytes:
    """Return a frame that is no edit."""
    return pack_frame(Prefix(kind=kind, body_size=len(body)), [body], seed=bytes([kind]))[0]
