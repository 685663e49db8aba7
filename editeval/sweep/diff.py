"""Where two runs differ: what they were asked to do, the edits that they wrote, what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from editeval.runner.results import ScoreStore
from editeval.runner.run_files import read_edits, read_manifest

HOW_TO_RUN = ("paths", "callback", "logger")


def compare(a: Path | str, b: Path | str) -> tuple[str, ...]:
    """Return one line a difference between two runs; empty where there is none. Nothing is loaded or measured.

    Raises:
        EditevalError: one of the folders is no run.
    """
    first, second = read_manifest(a), read_manifest(b)
    return (*_settings(first, second), *_edits(a, b), *_scores(a, b))


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    if first["model_fingerprint"] != second["model_fingerprint"]:
        yield f"model weights: {first['model_fingerprint'][:12]} | {second['model_fingerprint'][:12]}"
    ours, theirs = dict(_flat(first["config"])), dict(_flat(second["config"]))
    for name in sorted(ours.keys() | theirs.keys()):
        if name.split(".")[0] not in HOW_TO_RUN and ours.get(name, "-") != theirs.get(name, "-"):
            yield f"{name}: {ours.get(name, '-')} | {theirs.get(name, '-')}"
    for group in ("packages", "git"):
        packages = first.get(group) or {}, second.get(group) or {}
        for name in sorted(packages[0].keys() | packages[1].keys()):
            if packages[0].get(name) != packages[1].get(name):
                yield f"{group}.{name}: {packages[0].get(name)} | {packages[1].get(name)}"


def _edits(a: Path | str, b: Path | str) -> Iterator[str]:
    first, second = ({int(row["step"]): row for row in read_edits(run)} for run in (a, b))
    if len(first) != len(second):
        yield f"edits: {len(first)} | {len(second)}"
    for step in sorted(first.keys() & second.keys()):
        ours, theirs = first[step], second[step]
        if list(ours["request_ids"]) != list(theirs["request_ids"]):
            yield f"from edit {step} on other facts are edited: {', '.join(ours['request_ids'])} | {', '.join(theirs['request_ids'])}"
            return
        if ours["weights_digest"] != theirs["weights_digest"]:
            yield f"from edit {step} on the weights differ: {ours['weights_digest'][:12]} | {theirs['weights_digest'][:12]}"
            return


def _scores(a: Path | str, b: Path | str) -> Iterator[str]:
    first, second = ({(score.num_edits, score.name): score.value for score in ScoreStore(run).scores()} for run in (a, b))
    for key in sorted(first.keys() | second.keys()):
        ours, theirs = first.get(key), second.get(key)
        same = ours == theirs or (ours is not None and theirs is not None and math.isnan(ours) and math.isnan(theirs))
        if not same:
            yield f"{key[1]} after {key[0]} edits: {_number(ours)} | {_number(theirs)}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"
