"""Offline W&B runs read back with W&B's own program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def offline_records(run_dir: Path) -> list[Mapping[str, Any]]:
    """Read offline runs back with W&B's own reader."""
    program = shutil.which("wandb", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None
    records: list[Mapping[str, Any]] = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        done = subprocess.run([program, "leet", "inspect", "--json", str(path)], capture_output=True, text=True, check=True, timeout=60)
        records += [json.loads(line) for line in done.stdout.splitlines()]
    return records


def history(records: list[Mapping[str, Any]]) -> dict[tuple[int, str], Any]:
    """Return every logged value by (num_edits, key); a value logged twice is an error."""
    values: dict[tuple[int, str], Any] = {}
    for record in records:
        item = record.get("history", {}).get("item", {})
        for name, value in item.items():
            if not name.startswith("_") and name != "num_edits":
                assert (item["num_edits"], name) not in values, f"{name} was logged twice"
                values[(item["num_edits"], name)] = value
    return values
