"""Deltas in files that other programs read: their tensors in safetensors, everything else in JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.edits.delta import Delta
from editeval.edits.encoding import DELTA_KINDS, thawed
from editeval.files import write_atomic
from editeval.types import EditevalError


def save_deltas(stem: Path, deltas: Sequence[Delta]) -> None:
    """Write `<stem>.safetensors` (tensors, named `<number of the delta>.<field>`) and `<stem>.json` (kinds and plain fields)."""
    kinds = {kind: name for name, kind in DELTA_KINDS.items()}
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for number, delta in enumerate(deltas):
        values = {field.name: getattr(delta, field.name) for field in fields(delta)}
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        described.append({"kind": kinds[type(delta)], "values": plain})
    write_atomic(stem.with_suffix(".safetensors"), save(tensors))
    write_atomic(stem.with_suffix(".json"), json.dumps(described, ensure_ascii=False))


def load_deltas(stem: Path) -> tuple[Delta, ...]:
    """Return what `save_deltas` wrote.

    Raises:
        EditevalError: a file is missing or damaged, or holds a kind that this version does not know.
    """
    try:
        tensors = load_file(stem.with_suffix(".safetensors"))
        described = json.loads(stem.with_suffix(".json").read_text())
        deltas: list[Delta] = []
        for number, delta in enumerate(described):
            values = {name: thawed(value) for name, value in delta["values"].items()}
            prefix = f"{number}."
            values |= {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            kind: Callable[..., Delta] = DELTA_KINDS[delta["kind"]]
            deltas.append(kind(**values))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise EditevalError(f"{stem}.safetensors and {stem.name}.json do not hold what an export wrote ({error}); export again") from error
    return tuple(deltas)
