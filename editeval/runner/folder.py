"""The folder of a run beside its results: whether it can be written, what the results come from, the log."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from editeval.types import ConfigError

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "hydra-core", "safetensors", "tokenizers")


def check_writable(run_dir: Path, *, setting: str = "paths.runs") -> None:
    """Make the folder; `setting` is what names it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write results to {run_dir}: {error.strerror}; set {setting} to a folder that can be written") from error


def origin() -> Mapping[str, Any]:
    """Return what a result comes from beside its config: command, commit, versions, machine."""
    import torch

    return {
        "command": sys.argv,
        "git": _git_state(),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Keep what the package says within the context in a file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("editeval")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def _git_state() -> Mapping[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed_files": len(git("status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None  # an installed copy, or no git: the package versions still say what ran
