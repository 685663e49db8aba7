"""Files of trained parts: tensors, and beside them, as JSON under the name of their kind, what they belong to and what training reached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.files import write_atomic
from editeval.types import ConfigError


def write_archive(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, kind: str) -> None:
    """Write a part as a whole file or not at all."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(stored, {kind: json.dumps(about)}))


def read_archive(path: Path, belongs: Mapping[str, Any], *, kind: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors of a part, and what its file says of it.

    Raises:
        ConfigError: it is no file of this kind, or belongs to something else than `belongs` says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, Any] = json.loads((file.metadata() or {})[kind])
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is nothing that this method trained ({error}); remove it, or correct method.archive") from error
    for name, value in belongs.items():
        if name not in about or about[name] != value:
            raise ConfigError(
                f"{path} was trained with {name}={about.get(name)}, this run has {name}={value}; what is trained belongs to one model, its "
                "tokenizer and its settings: leave method.archive out to train it for this run, or choose what it was trained with"
            )
    return tensors, about
