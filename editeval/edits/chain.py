"""What stands in a journal's folder: the segments that count, oldest first, and the edits in them.

The newest segment with a header decides: it names the segment and the state that it builds on, and so on down to the first.
Whatever else lies in older segments was superseded before anybody could rely on it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from editeval.edits.segment import JournalEntry, Segment, SegmentHeader, genesis_digest
from editeval.types import JournalError

SEGMENT_NAME = re.compile(r"segment-(\d{6,})\.journal")


class Chain:
    """The edits on disk as of the last `rescan`; never writes."""

    def __init__(self, folder: Path, *, genesis: str) -> None:
        self.folder = folder
        self.genesis = genesis
        self._files: dict[int, Segment] = {}
        self._segments: list[Segment] = []
        self._newest_file = 0

    @property
    def head(self) -> Segment | None:
        """The newest segment that counts."""
        return self._segments[-1] if self._segments else None

    @property
    def last_step(self) -> int:
        """Number of edits."""
        return self._segments[-1].last_step if self._segments else 0

    @property
    def settled(self) -> bool:
        """Whether no file newer than `head` was there once everything had been read, so that its edits stand for good."""
        return self._newest_file == (self.head.epoch if self.head else 0)

    def path(self, epoch: int) -> Path:
        """Return where segment `epoch` lies."""
        return self.folder / f"segment-{epoch:06d}.journal"

    def newest_epoch(self) -> int:
        """Return the highest number of a segment file that is there right now, with or without a header; 0 when none."""
        return max(self._epochs(), default=0)

    def digest_at(self, step: int) -> str:
        """Return the state (hex) after `step` edits, from 0 to `last_step`."""
        return self._segments[self._position(step)].digest_at(step) if step else genesis_digest(self.genesis)

    def read(self, steps: range) -> Iterator[JournalEntry]:
        """Yield the entries of these steps, from 1 to `last_step`; raises JournalError for a damaged byte."""
        start = steps.start
        while start < steps.stop:
            position = self._position(start)
            segment = self._segments[position]
            following = self._segments[position + 1 : position + 2]
            stop = min([steps.stop, *(later.first_step for later in following)])
            yield from segment.read(range(start, stop))
            start = stop

    def rescan(self) -> None:
        """Learn what was written since.

        Raises:
            JournalError: a byte is not what was written, a file is missing, or the folder holds another trajectory.
        """
        epochs: set[int] | None = None
        while epochs != (listed := self._epochs()):  # a newer segment that came up meanwhile may not build on what was read
            epochs = listed
            self._scan(epochs)
        self._newest_file = max(epochs, default=0)
        self._segments = self._linked()

    def extend(self, segment: Segment) -> None:
        """Note the segment that was just begun on top of all others."""
        self._files[segment.epoch] = segment
        self._newest_file = segment.epoch
        self._segments.append(segment)

    def _position(self, step: int) -> int:
        """Return which segment's word counts at `step`: the newest that had begun by then."""
        return bisect_right(self._segments, step, key=lambda segment: segment.first_step) - 1

    def _epochs(self) -> set[int]:
        try:
            names = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in map(SEGMENT_NAME.fullmatch, names) if match}

    def _scan(self, epochs: set[int]) -> None:
        newest = self._segments[-1].epoch if self._segments else 0
        self._files = {epoch: segment for epoch, segment in self._files.items() if epoch in epochs}
        for epoch in sorted(epochs):
            segment = self._files.get(epoch)
            if segment is None:
                segment = self._files[epoch] = Segment(self.path(epoch), epoch=epoch)
            elif segment.header is not None and epoch < newest:
                continue  # what counts of it is fixed
            segment.scan(genesis=self.genesis)

    def _linked(self) -> list[Segment]:
        begun = [segment for _, segment in sorted(self._files.items()) if segment.header is not None]
        linked: list[Segment] = begun[-1:]
        while linked and (header := linked[0].header) is not None and header.base:
            linked.insert(0, self._base_of(linked[0], header))
        if linked:
            root = linked[0].header
            if root is None or root.first_step != 1 or root.parent != genesis_digest(self.genesis):
                raise JournalError(f"{linked[0].path} says that it comes first but builds on other edits; put the folder back from a copy")
        return linked

    def _base_of(self, segment: Segment, header: SegmentHeader) -> Segment:
        base, wanted = self._files.get(header.base), header.first_step - 1
        if base is None or base.header is None or base.epoch >= header.epoch:
            raise JournalError(f"{segment.path} builds on segment {header.base}, which is missing; put {self.path(header.base)} back")
        if base.last_step < wanted:  # its last edits may have come after it was scanned
            base.scan(genesis=self.genesis)
        if not base.first_step - 1 <= wanted <= base.last_step:
            raise JournalError(
                f"{base.path} is cut short at byte {base.end} (step {base.last_step + 1}): {segment.path.name} builds on its "
                f"steps up to {wanted}; put the file back from a copy"
            )
        if base.digest_at(wanted) != header.parent:
            raise JournalError(
                f"{segment.path} builds on state {header.parent[:12]} after step {wanted}, {base.path.name} has "
                f"{base.digest_at(wanted)[:12]}; put both back from a copy"
            )
        return base
