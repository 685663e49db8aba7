"""Files of trained parts: tensors, and beside them, as JSON under the name of their kind, what they belong to and what training reached."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.datasets.text import normalize_answer
from editeval.datasets.training import TrainingSet
from editeval.files import write_atomic
from editeval.types import ConfigError, content_key, counted

logger = logging.getLogger(__name__)


def write_archive(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, kind: str) -> None:
    """Write a part as a whole file or not at all."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(stored, {kind: json.dumps(about)}))


def read_archive(path: Path, belongs: Mapping[str, Any], *, kind: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors of a part, and what its file says of it.

    Raises:
        ConfigError: it is no file of this kind, or belongs to something else than `belongs` says.
    """
    about = _about(path, kind=kind)
    for name, value in belongs.items():
        if name not in about or about[name] != value:
            raise ConfigError(
                f"{path} was trained with {name}={about.get(name)}, this run has {name}={value}; what is trained belongs to one model, its "
                "tokenizer and its settings: leave method.archive out to train it for this run, or choose what it was trained with"
            )
    return load_file(path), about


def rows_learned(training: TrainingSet) -> dict[str, Any]:
    """Return what the file of a part says of its rows: how many, their content hash, and a short hash of every subject."""
    rows = training.load()
    subjects = {_short(normalize_answer(row.subject)) for row in rows}
    return {"rows": len(rows), "training": training.content_hash(), "subjects": sorted(subjects)}


def check_rows(path: Path, training: TrainingSet, *, kind: str) -> None:
    """See that a part learned from the rows of `training`, and no subject that is edited, as far as its file says.

    Where `training` has no rows here, only the subjects are compared; a file that does not say what it learned is warned of.

    Raises:
        ConfigError: it is no file of this kind, or learned from other rows or from a subject that is edited.
        DatasetError: a row of the training set, or of what is edited, is wrong.
    """
    about = _about(path, kind=kind)
    learned = about.get("training", about.get("settings", {}).get("training"))  # networks had it among their settings first
    edited = {_short(subject): subject for subject in training.edited_subjects()}
    known = sorted(edited[short] for short in edited.keys() & set(about.get("subjects", ())))
    if known:
        raise ConfigError(
            f"{path} learned from rows about {counted(len(known), 'subject')} of what is edited, such as {known[0]!r}, so a run would "
            "measure its memory; edit another data set, or leave method.archive out to train without them"
        )
    if training.of is not None and learned not in (None, training.content_hash()):
        raise ConfigError(
            f"{path} learned from other rows ({about.get('rows')}, hash {learned[:12]}) than training={training.name} leaves beside what "
            f"is edited ({len(training.load())}, hash {training.content_hash()[:12]}); choose the training and the dataset that it was "
            "trained with, or training=elsewhere, which asks only that it learned no subject that is edited"
        )
    if "subjects" not in about and (training.of is None or learned is None):
        logger.warning("%s does not say which rows it learned from: whether it knows subjects that are edited cannot be told", path)


def _about(path: Path, *, kind: str) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, Any] = json.loads((file.metadata() or {})[kind])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is nothing that this method trained ({error}); remove it, or correct method.archive") from error
    return about


def _short(subject: str) -> str:
    return content_key(subject)[:16]
