"""Files of trained parts: tensors, and beside them what they belong to and what their training reached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.files import write_atomic
from editeval.models.gguf import file_sha256
from editeval.types import ConfigError


def write_archive(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a part as a whole file or not at all."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(stored, {"about": json.dumps(about)}))


def read_archive(path: Path, belongs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors of a part, and what its file says of it.

    Raises:
        ConfigError: it is no such file, or belongs to something else than `belongs` says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, Any] = json.loads((file.metadata() or {})["about"])
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is no trained part of this method ({error}); remove it, or correct method.archive") from error
    for name, value in belongs.items():
        if name not in about or about[name] != value:
            raise ConfigError(
                f"{path} was trained with {name}={about.get(name)}, this run has {name}={value}; leave method.archive out to train a part "
                "for this run, or choose what it was trained with"
            )
    return tensors, about


def file_key(path: Path) -> str:
    """Return the sha256 of a part's file."""
    return file_sha256(path)
