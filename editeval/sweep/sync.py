"""`python -m editeval sync`: bring Weights & Biases up to what is on disk, each row exactly once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from editeval.files import write_atomic
from editeval.interfaces import RunState
from editeval.runner.mirrored import rows_on_disk
from editeval.runner.run_files import read_manifest
from editeval.runner.wandb_mirror import WandbMirror
from editeval.sweep.plan import counts_of
from editeval.types import EditevalError, content_key

SYNCED = Path("wandb") / "synced.json"
PATIENCE = {"finish_timeout_seconds": 300.0}  # a run must not wait for a tracker; this command does nothing else


def sync_run(run_dir: Path, **settings: Any) -> int:
    """Send W&B whatever it lacks of a run and return how many rows these were; 0 where it has confirmed to have them all.

    The settings are those that the run was made with (`logger.wandb`), then `settings` such as project or entity. Where what is on disk
    was confirmed before, no connection is made.

    Raises:
        EditevalError: no connection, or the server does not confirm what was sent; run it again later.
    """
    manifest = read_manifest(run_dir)
    mirror = WandbMirror(**{**_settings_of(manifest), **PATIENCE, **settings, "mode": "online"})
    destination = {"server": os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), "entity": mirror.entity, "project": mirror.project}
    wanted = {**destination, "rows": content_key({name: repr(row.numbers) for name, row in rows_on_disk(run_dir).items()})}
    if _read(run_dir / SYNCED) == wanted:
        return 0
    state = _state_of(run_dir, manifest)
    sent = 0
    try:
        for _ in range(2):
            missing = mirror.replay(state)
            sent += missing
            if missing == 0:  # the server counts every row: what was sent has arrived
                write_atomic(run_dir / SYNCED, json.dumps(wanted))
                return sent
    except Exception as error:
        raise EditevalError(
            f"W&B did not take {run_dir.name} ({type(error).__name__}: {str(error).strip().splitlines()[:1]}); the scores are complete on "
            "disk: run `python -m editeval sync` again later"
        ) from error
    raise EditevalError(f"W&B does not confirm the {sent} rows of {run_dir.name}; run `python -m editeval sync` again later")


def _settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    given = (manifest["config"].get("logger") or {}).get("wandb") or {}
    known = {item.name for item in fields(WandbMirror) if item.init}
    return {name: value for name, value in given.items() if name in known}


def _state_of(run_dir: Path, manifest: Mapping[str, Any]) -> RunState:
    config = manifest["config"]
    return RunState(
        run_dir=str(run_dir),
        edit_key=manifest["edit_key"],
        model_name=config["model"]["name"],
        method_name=config["method"]["name"],
        dataset_name=config["dataset"]["name"],
        rungs=tuple(sorted({0, *counts_of(config["num_edits"])})),
        num_edits=0,
        state_digest=manifest["model_fingerprint"],
        config=config,
    )


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
