"""The files of a run beside its scores: manifest, edit log, note of a collapse, timings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editeval.files import append_jsonl, read_jsonl, restore_floats, tag_floats, write_atomic
from editeval.types import EditevalError

MANIFEST_FILE = "manifest.json"
JOURNAL_FOLDER = "journal"
EDITS_FILE = "edits.jsonl"
TIMINGS_FILE = "timings.jsonl"
COLLAPSE_FILE = "collapse.json"
_REQUIRED = ("config", "edit_key", "model_fingerprint")  # of a manifest


def write_manifest(run_dir: Path | str, manifest: Mapping[str, Any]) -> Path:
    """Write what the run is made of (config, versions, device) as `manifest.json`, whole or not at all; return its path."""
    path = Path(run_dir) / MANIFEST_FILE
    write_atomic(path, json.dumps(tag_floats(dict(manifest)), indent=2, ensure_ascii=False, default=str) + "\n")
    return path


def read_manifest(run_dir: Path | str) -> dict[str, Any]:
    """Return a run's manifest.

    Raises:
        EditevalError: there is none, or it is no JSON object, or lacks what says which run it is.
    """
    path = Path(run_dir) / MANIFEST_FILE
    if not path.exists():
        raise EditevalError(
            f"{path.parent} has no {MANIFEST_FILE}, so it is no run's folder; give the folder that `python launch.py` named"
        )
    try:
        manifest = restore_floats(json.loads(path.read_text()))
    except ValueError as error:
        raise EditevalError(f"{path} is no JSON ({error}); run the same command again, which writes it anew") from error
    if not isinstance(manifest, dict):
        raise EditevalError(f"{path} holds a {type(manifest).__name__}, not an object; run the same command again, which writes it anew")
    missing = [name for name in _REQUIRED if name not in manifest]
    if missing:
        raise EditevalError(f"{path} lacks {', '.join(missing)}; run the same command again, which writes it anew")
    return manifest


def read_edits(run_dir: Path | str) -> tuple[dict[str, Any], ...]:
    """Return the edit log's rows by step, those without one left out; where a step was logged twice (another digest), the later row."""
    rows, _ = read_jsonl(Path(run_dir) / EDITS_FILE)
    latest = {int(row["step"]): restore_floats(row) for row in rows if "step" in row}
    return tuple(latest[step] for step in sorted(latest))


def append_edit(run_dir: Path | str, row: Mapping[str, Any]) -> None:
    """Append one row to the edit log."""
    append_jsonl(Path(run_dir) / EDITS_FILE, [tag_floats(dict(row))])


def write_collapse(run_dir: Path | str, *, step: int, digest: str, request_ids: Sequence[str], reason: str) -> None:
    """Note the edit that broke the model, unless an earlier one is noted (`digest` is the state after it)."""
    before = read_collapse(run_dir)
    if before is None or int(before["step"]) >= step:
        row = {"step": step, "digest": digest, "request_ids": list(request_ids), "reason": reason}
        write_atomic(Path(run_dir) / COLLAPSE_FILE, json.dumps(row))


def read_collapse(run_dir: Path | str) -> dict[str, Any] | None:
    """Return the note of the edit that broke the model, or None."""
    path = Path(run_dir) / COLLAPSE_FILE
    return json.loads(path.read_text()) if path.exists() else None


def read_timings(run_dir: Path | str) -> dict[str, float]:
    """Return seconds by kind of work, summed over every launch of this run."""
    rows, _ = read_jsonl(Path(run_dir) / TIMINGS_FILE)
    total: dict[str, float] = {}
    for row in rows:
        for name, seconds in row["seconds"].items():
            total[name] = total.get(name, 0.0) + float(seconds)
    return total


def read_peak_memory(run_dir: Path | str) -> int | None:
    """Return the most memory in bytes that a launch of this run had in use (jobs of one process count together), or None."""
    rows, _ = read_jsonl(Path(run_dir) / TIMINGS_FILE)
    return max((int(row["peak_memory_bytes"]) for row in rows if "peak_memory_bytes" in row), default=None)
