"""Files that survive a kill at any instant (atomic writes, folders built once, JSON lines, a keyed cache), and what names them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part (also after a power cut)."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes files private; a shared cache is read by a group
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder `target`, filling it with `build(temporary folder)` unless it exists.

    The folder appears under its name only when it is whole and on disk. Builders that race all build; the first one's stays.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        build(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)  # mkdtemp makes folders private; a shared cache is read by a group
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a whole file or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Append rows with one write; a line torn by a kill is closed first, so it costs no later line."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=True).encode() + b"\n" for row in rows)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a file that `append_jsonl` wrote, and how many torn lines, and lines that hold no object, were left out."""
    if not path.exists():
        return [], 0
    rows: list[dict[str, Any]] = []
    torn = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    return rows, torn


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(folder: Path, *patterns: str) -> str:
    """Return the sha256 over the files that match a pattern, each once: their paths inside the folder and their bytes."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def tag_floats(value: Any) -> Any:
    """Return the value with NaN and infinity as `{"non_finite": "nan"}`: standard JSON that `restore_floats` turns back."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"non_finite": repr(value)}
    if isinstance(value, Mapping):
        return {key: tag_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tag_floats(item) for item in value]
    return value


def restore_floats(value: Any) -> Any:
    """Return what `tag_floats` was given, read back from JSON; tuples are lists."""
    if isinstance(value, dict):
        if set(value) == {"non_finite"} and value["non_finite"] in ("nan", "inf", "-inf"):
            return float(value["non_finite"])
        return {key: restore_floats(item) for key, item in value.items()}
    return [restore_floats(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Cache:
    """A folder shared by many runs; each entry is named by kind and content key and written atomically.

    Two processes that compute the same entry write the same bytes; the later one wins, nobody waits.
    """

    root: Path

    def path(self, kind: str, key: str, suffix: str) -> Path:
        """Return where the entry lives: `<root>/<kind>/<key><suffix>`."""
        return self.root / kind / f"{key}{suffix}"

    def json(self, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        """Return the stored JSON value of this key, computing and storing it once."""
        path = self.path(kind, key, ".json")
        if path.exists():
            return json.loads(path.read_text())
        value = compute()
        write_atomic(path, json.dumps(value, ensure_ascii=False))
        return value
