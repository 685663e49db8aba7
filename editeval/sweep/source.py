"""Which program this is: a job counts as done only for the code and the config files that did it."""

from __future__ import annotations

from pathlib import Path

from editeval.files import files_hash

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (
    "conf/**/*.yaml",
    "editeval/**/*.py",
    "editeval/**/*.yaml",
    "editeval/**/*_yaml",  # what task files of the harness include
    "editeval/**/*.jsonl",
    "editeval/**/*.txt",
    "hydra_plugins/**/*.py",
)


def program_digest() -> str:
    """Return the hash of the package's code, facts, tasks and items, of `conf/` and of `hydra_plugins/` (some hundred small files)."""
    return files_hash(ROOT, *PROGRAM)[:16]


def groups_that_set_everything() -> frozenset[str]:
    """Return the config groups with a file that writes outside its own node (`# @package _global_`), such as `ladder`."""
    marked = "# @package _global_"
    return frozenset(path.parent.name for path in (ROOT / "conf").glob("*/*.yaml") if path.read_text().startswith(marked))
