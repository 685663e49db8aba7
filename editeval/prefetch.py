"""Fill a folder with all that a run reads, so that it runs where there is no network.

    python -m editeval prefetch model=gpt2-xl dataset=counterfact benchmark=paper --to /scratch/editeval
    python launch.py model=gpt2-xl dataset=counterfact benchmark=paper paths.data=/scratch/editeval \\
        model.name_or_path=/scratch/editeval/models/gpt2-xl

The folder has the layout of `paths.data`, a folder `models/`, and `prefetch.json`: the sha256 of every file, and which part of a run it
belongs to. What is there and unchanged is not fetched again, so a stopped call is simply repeated. Task files come with the packages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from editeval.build import build
from editeval.datasets.corpus import Corpus
from editeval.files import file_sha256, write_atomic
from editeval.interfaces import Benchmark, EditDataset, EditMethod, Fetches, FetchesModels, ModelSource
from editeval.types import EditevalError, Progress, SilentProgress, content_key

MANIFEST = "prefetch.json"


@dataclass(frozen=True, kw_only=True)
class Prefetched:
    """What a folder holds of a run: sha256 by file (its path inside the folder), and the settings that use it."""

    folder: Path
    files: Mapping[str, str]
    fetched: tuple[str, ...]
    overrides: tuple[str, ...]


def prefetch(config: DictConfig, folder: Path, progress: Progress | None = None) -> Prefetched:
    """Fetch the model, the facts, the rows and models that the method learns from, the corpus and every benchmark's data, each part once.

    Raises:
        EditevalError: a part cannot be had; those before it are kept, so that the call can be repeated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = progress or SilentProgress()
    parts: dict[str, dict[str, Any]] = _read(folder).get("parts", {})
    used: list[str] = []
    fetched: list[str] = []
    overrides = [f"paths.data={folder}"]
    for name, node, thing in _parts(config):
        if not isinstance(thing, Fetches):
            continue
        settings = content_key(OmegaConf.to_container(node, resolve=True))
        known = parts.get(name)
        if known is None or known["settings"] != settings or not _is_whole(folder, known["files"]):
            progress.message(f"{name}: fetching")
            paths = thing.fetch(folder)
            if not paths:
                continue  # all of it is at hand wherever the package is
            parts[name] = {"settings": settings, "files": {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}}
            write_atomic(folder / MANIFEST, json.dumps({"parts": parts}, indent=2, sort_keys=True) + "\n")
            fetched.append(name)
        used.append(name)
        if isinstance(thing, FetchesModels):
            overrides += [f"{name}.{setting}={value}" for setting, value in thing.found_in(folder).items()]
    files = {path: digest for name in used for path, digest in parts[name]["files"].items()}
    return Prefetched(folder=folder, files=files, fetched=tuple(fetched), overrides=tuple(overrides))


def damaged(folder: Path) -> tuple[str, ...]:
    """Return the files of the manifest that are not there or not what was fetched.

    Raises:
        EditevalError: the folder has no manifest.
    """
    if not (folder / MANIFEST).is_file():
        raise EditevalError(f"{folder} has no {MANIFEST}; fill it with `python -m editeval prefetch ... --to {folder}`")
    parts = _read(folder)["parts"].values()
    return tuple(sorted({path for part in parts for path, digest in part["files"].items() if not _is_whole(folder, {path: digest})}))


def _parts(config: DictConfig) -> Iterator[tuple[str, DictConfig, object]]:
    """Yield (name, settings, object) of everything that reads files, the largest last."""
    for name, node in (config.get("benchmark") or {}).items():
        yield f"benchmark.{name}", node, build(node, f"benchmark.{name}", Benchmark)
    yield "dataset", config.dataset, build(config.dataset, "dataset", EditDataset)
    yield "training", config.training, build(config.training, "training", EditDataset)
    yield "method", config.method, build(config.method, "method", EditMethod)
    yield "corpus", config.corpus, build(config.corpus, "corpus", Corpus)
    yield "model", config.model, build(config.model, "model", ModelSource)


def _is_whole(folder: Path, files: Mapping[str, str]) -> bool:
    return all((folder / path).is_file() and file_sha256(folder / path) == digest for path, digest in files.items())


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise EditevalError(f"{path} cannot be read ({error}); delete it and fetch again") from error
    return manifest
