"""Frames: a file that grows at its end, cut into pieces of which each can be checked by itself.

    prefix  (36 bytes)  magic, kind, layout number, size of the ids, size of the body, seconds, crc32 of all of these
    body                JSON, or request ids followed by the raw bytes of tensors (little-endian)
    trailer (32 bytes)  sha256 of a seed and the body; for an edit it is the link of the hash chain

The prefix checks itself, so a damaged length is never mistaken for a frame cut short. What a kill or a power cut leaves of the
frame in flight (a part of it, or a tail of zeros where the file was extended but never filled) is told apart from damage: it is
the end of the file and nothing follows.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO

MAGIC = b"EDJ1"
PREFIX_FIELDS = struct.Struct("<4sB3xIIQd")
PREFIX_CHECK = struct.Struct("<I")
PREFIX_SIZE = PREFIX_FIELDS.size + PREFIX_CHECK.size
TRAILER_SIZE = hashlib.sha256().digest_size
CHUNK_SIZE = 1 << 20
# A sha256 ends in eight zero bytes once in 2**64 frames, and no single flipped byte makes it so.
UNWRITTEN = bytes(8)


class FrameKind(IntEnum):
    """What a frame holds."""

    HEADER = 1
    LAYOUT = 2
    EDIT = 3
    END = 4


class FrameDamageError(Exception):
    """Bytes on disk are not what was written; the caller adds file, offset and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The fixed head of a frame; sizes in bytes."""

    kind: FrameKind
    body_size: int
    layout: int = 0
    ids_size: int = 0
    seconds: float = 0.0

    @property
    def frame_size(self) -> int:
        """Bytes of the whole frame."""
        return PREFIX_SIZE + self.body_size + TRAILER_SIZE

    def pack(self) -> bytes:
        """Return the 36 bytes on disk."""
        fields = PREFIX_FIELDS.pack(MAGIC, self.kind, self.layout, self.ids_size, self.body_size, self.seconds)
        return fields + PREFIX_CHECK.pack(zlib.crc32(fields))

    @classmethod
    def unpack(cls, data: bytes) -> Prefix:
        """Return the prefix written in 36 bytes; raises FrameDamageError when they do not check."""
        fields = data[: PREFIX_FIELDS.size]
        if PREFIX_CHECK.unpack_from(data, PREFIX_FIELDS.size)[0] != zlib.crc32(fields):
            raise FrameDamageError("the head of the frame does not match its checksum")
        magic, kind, layout, ids_size, body_size, seconds = PREFIX_FIELDS.unpack(fields)
        if magic != MAGIC or kind not in FrameKind._value2member_map_:
            raise FrameDamageError(f"frame {magic!r} of kind {kind} was written by another version; this one reads {MAGIC!r}")
        return cls(kind=FrameKind(kind), body_size=body_size, layout=layout, ids_size=ids_size, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame that checked; `body` is empty where it was hashed but not kept."""

    prefix: Prefix
    digest: bytes
    body: bytes


def pack_frame(prefix: Prefix, body: Iterable[bytes | memoryview], *, seed: bytes) -> tuple[bytes, bytes]:
    """Return a frame's bytes and its digest, sha256(seed + body)."""
    parts = list(body)
    hasher = hashlib.sha256(seed)
    for part in parts:
        hasher.update(part)
    digest = hasher.digest()
    return b"".join([prefix.pack(), *parts, digest]), digest


def read_frame(file: BinaryIO, *, size: int, seed: Callable[[Prefix], bytes], keep_edits: bool) -> Frame | None:
    """Read the frame at the file's position, or return None when the file ends there, be it cleanly or in a frame cut short.

    Args:
        file: opened for reading, positioned at the frame.
        size: the file's size in bytes; what was appended since counts as not there.
        seed: the bytes that the digest starts from, given the prefix.
        keep_edits: whether to return the body of an edit; False only hashes it.

    Raises:
        FrameDamageError: the bytes are not those that were written.
    """
    start = file.tell()
    head = file.read(PREFIX_SIZE)
    if start + PREFIX_SIZE > size or len(head) < PREFIX_SIZE:
        return None
    try:
        prefix = Prefix.unpack(head)
    except FrameDamageError:
        if _is_zero(file, size):
            return None
        raise
    if start + prefix.frame_size > size:
        return None
    keep = keep_edits or prefix.kind is not FrameKind.EDIT
    hasher = hashlib.sha256(seed(prefix))
    kept: list[bytes] = []
    for chunk in _chunks(file, prefix.body_size):
        hasher.update(chunk)
        if keep:
            kept.append(chunk)
    trailer = file.read(TRAILER_SIZE)
    if trailer != hasher.digest():
        if trailer.endswith(UNWRITTEN) and _is_zero(file, size):
            return None
        raise FrameDamageError("the body of the frame does not match its sha256")
    return Frame(prefix=prefix, digest=trailer, body=b"".join(kept))


def _chunks(file: BinaryIO, size: int) -> Iterable[bytes]:
    while size > 0:
        chunk = file.read(min(size, CHUNK_SIZE))
        if not chunk:
            return
        size -= len(chunk)
        yield chunk


def _is_zero(file: BinaryIO, size: int) -> bool:
    """Whether everything from the file's position to `size` is zero bytes."""
    return all(not chunk.strip(b"\0") for chunk in _chunks(file, size - file.tell()))
