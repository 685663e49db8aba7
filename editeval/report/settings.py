"""What a run was set to: which settings tell runs of a method apart, and which must be the same on models that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editeval.report.study import Run
from editeval.types import content_key

NAMED_SETTINGS = 3  # of a label; where more differ, a hash tells the settings apart
FILES_OF_A_MODEL = ("covariance", "archive")  # settings that name a file which was made for one model


def differing(runs: Sequence[Run], group: str, named: Callable[[Run], tuple[str, str]]) -> dict[Path, Mapping[str, str]]:
    """Return, by folder, each run's settings of those that differ between runs of its name under the same condition.

    `named` tells both: the name, and the condition (a method's model).
    """
    flat = {run.folder: _flat(run.config.get(group, {})) | (beside_the_method(run.config) if group == "method" else {}) for run in runs}
    alike: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        name, condition = named(run)
        alike.setdefault(name, {}).setdefault(condition, []).append(flat[run.folder])
    told: dict[str, list[str]] = {}
    for name, groups in alike.items():
        keys = {key for mine in groups.values() for one in mine for key in one if not key.startswith(("_target_", "corpus.", "of.corpus."))}
        told[name] = sorted(key for key in keys if any(len({repr(one.get(key)) for one in mine}) > 1 for mine in groups.values()))
    return {run.folder: {key: str(flat[run.folder].get(key)) for key in told[named(run)[0]]} for run in runs}


def labelled(name: str, settings: Mapping[str, str]) -> str:
    """Return a name with the settings that tell it from others of that name."""
    told = ", ".join(f"{key}={short(value)}" for key, value in list(settings.items())[:NAMED_SETTINGS])
    if len(settings) > NAMED_SETTINGS:
        told += f", … {content_key(dict(settings))[:4]}"
    return f"{name} ({told})" if told else name


def beside_the_method(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an edit depends on beside the method's settings (which hold what it learns from) and the model's name."""
    model = config.get("model", {})
    return {
        "batch": config.get("batch_size", 1),
        "dtype": model.get("dtype"),
        "revision": model.get("revision"),
        "prompt_format": config.get("prompt_format", "raw"),  # a run of before it was a setting has none
    }


def across_models(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that must be the same on two models before these are compared.

    Not what names classes, texts or paths: of what it learned from the name counts, of a file that was made for one model that it
    has one.
    """
    found = {key: value for key, value in _flat(method).items() if _counts_across_models(key.split("."))}
    return {key: value is not None if key.split(".")[-1] in FILES_OF_A_MODEL else value for key, value in found.items()}


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two sets of settings, and both values; one that is not there is None."""
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def short(value: str) -> str:
    """Return a value for a label."""
    text = "default" if value == "None" else value
    return text if len(text) <= 24 else f"{text[:23]}…"


def _counts_across_models(parts: Sequence[str]) -> bool:
    return parts[-1] != "_target_" and "corpus" not in parts and ("training" not in parts or parts[-2:] == ["training", "name"])


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
