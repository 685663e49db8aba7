"""Writing a segment: one write a frame, on the disk before it counts."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Sequence

from editeval.edits.encoding import EncodedEdit
from editeval.edits.frames import FrameKind, Prefix, pack_frame
from editeval.edits.segment import Segment, SegmentHeader, edit_seed, pack_plain
from editeval.types import JournalError


class SegmentWriter:
    """Appends to a segment that it creates; after a failed write it must not be used again."""

    def __init__(self, segment: Segment) -> None:
        """Create the file, and its folder where it is missing.

        Raises:
            FileExistsError: another writer was first.
            JournalError: the file cannot be created.
        """
        self.segment = segment
        self.pid = os.getpid()
        try:
            segment.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(segment.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            raise self._failure(error) from error
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def write_header(self, header: SegmentHeader) -> None:
        """Write the header, and make sure that the file's name survives a power cut as well."""
        data = header.pack()
        self._write(data)
        self._flush(self._descriptor)
        folder = os.open(self.segment.path.parent, os.O_RDONLY)
        try:
            self._flush(folder)
        finally:
            os.close(folder)
        self.segment.begin(header, size=len(data))

    def write_edit(self, request_ids: Sequence[str], edit: EncodedEdit, seconds: float) -> None:
        """Write one edit, and before it its layout where the segment does not hold it yet; return when it is on the disk.

        Raises:
            JournalError: the disk is full, the folder is read-only, ...; everything written earlier is intact.
        """
        segment = self.segment
        found = os.fstat(self._descriptor).st_size
        if found != segment.end:
            raise JournalError(f"{segment.path} has {found} bytes, {segment.end} were written; something else changed it: put it back")
        number = segment.layout_number(edit.layout)
        if number is None:
            layout = pack_plain(FrameKind.LAYOUT, edit.layout)
            self._write(layout)
            number = segment.note_layout(edit.layout, size=len(layout))
        ids = json.dumps(list(request_ids), separators=(",", ":")).encode()
        size = len(ids) + sum(len(tensor) for tensor in edit.tensors)
        prefix = Prefix(kind=FrameKind.EDIT, body_size=size, layout=number, ids_size=len(ids), seconds=seconds)
        seed = edit_seed(segment.parent_of(segment.last_step + 1), edit.layout, len(ids))
        frame, digest = pack_frame(prefix, [ids, *edit.tensors], seed=seed)
        self._write(frame)
        self._flush(self._descriptor)
        segment.note_edit(digest, size=len(frame))

    def write_end(self) -> None:
        """Mark that nothing more will come, so that whoever comes next need not wait."""
        self._write(pack_plain(FrameKind.END, b"{}"))

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._finalizer()

    def _write(self, data: bytes) -> None:
        # one write a frame: a kill leaves a part of one frame, never two halves of two
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise self._failure(error) from error

    def _flush(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do this, for folders above all
                raise self._failure(error) from error

    def _failure(self, error: OSError) -> JournalError:
        advice = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some of the quota",
            errno.EACCES: "make the folder writable",
            errno.EROFS: "make the folder writable",
        }.get(error.errno or 0, "see to the disk")
        return JournalError(
            f"cannot write {self.segment.path}: {error.strerror}; every earlier edit is intact: {advice}, then start the same run again"
        )
