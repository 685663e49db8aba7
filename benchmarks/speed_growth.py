"""Seconds an edit over a long sequence, for `edit_speed.py`: whether the thousandth edit costs more than the first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import median

from benchmarks.speed_setup import configured, timed
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.models.tiny import TinyModel
from editeval.types import EditRequest, SilentProgress

METHODS = ("rome", "memit", "pmet", "emmet", "alphaedit")
KEY_WIDTH = 1536  # SmolLM2's: what AlphaEdit remembers of earlier edits grows with it
WINDOW = 50
SYLLABLES = ("Ba", "Ke", "Lo", "Mi", "Nu", "Ra", "So", "Ta", "Ve", "Zi")
NAMES = ("Darrieux", "Pannella", "Stabbins", "Humphrey", "Poynting", "Herzig", "Alvarez", "Lindqvist", "Moreau", "Okafor")
TARGETS = ("English", "Russian", "Spanish", "Serbian", "French")


def growth(edits: int) -> dict[str, dict[str, float]]:
    """Return by method the median CPU seconds (computing and applying) of the edits around the first, middle and last of `edits`."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            seconds = list(_sequence(name, edits, Path(folder)))
            half = max(0, edits // 2 - WINDOW)
            windows: Mapping[str, list[float]] = {"1": seconds[:WINDOW], str(half + 1): seconds[half : half + WINDOW]}
            windows = {**windows, str(max(0, edits - WINDOW) + 1): seconds[-WINDOW:]}
            found[name] = {start: median(part) for start, part in windows.items()}
    return found


def _sequence(name: str, edits: int, folder: Path) -> Iterator[float]:
    """Yield the CPU seconds of one edit after another of a tiny model whose keys are as wide as SmolLM2's."""
    source = TinyModel(
        name="tiny-gpt2", architecture="gpt2", cache_dir=folder, device="cpu", overrides={"n_inner": KEY_WIDTH}, vocab_size=2000
    )
    model = EditedModel(source.load())
    method = configured(name, EditMethod, "corpus.tokens=5000")
    editor = method.prepare(model, Cache(folder), SilentProgress())
    for number, ((first, second, third), last) in enumerate(product(product(SYLLABLES, repeat=3), NAMES)):
        if number == edits:
            return
        subject = f"{first}{second.lower()}{third.lower()} {last}"
        request = EditRequest(
            request_id=str(number), prompt="The mother tongue of {} is", subject=subject, target_new=TARGETS[number % len(TARGETS)]
        )
        _, seconds = timed(lambda: model.apply(editor.edit([request], seed=number)))  # noqa: B023  (called at once)
        yield seconds
