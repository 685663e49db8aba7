"""Which program this is: a job counts as done only for the code and the config files that did it."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def program_digest() -> str:
    """Return the hash of every Python and YAML file of the package and of `conf/` (about a hundred small files)."""
    found = sorted([*(ROOT / "editeval").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")])
    digest = hashlib.sha256()
    for path in found:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def groups_that_set_everything() -> frozenset[str]:
    """Return the config groups with a file that writes outside its own node (`# @package _global_`), such as `ladder`."""
    marked = "# @package _global_"
    return frozenset(path.parent.name for path in (ROOT / "conf").glob("*/*.yaml") if path.read_text().startswith(marked))
