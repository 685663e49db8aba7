"""The control that edits nothing: what the ladder measures on an unchanged model is the noise of the measurement.

python launch.py method=none
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.types import EditRequest, Footprint, ModelDescription, Progress, Workload


@dataclass(frozen=True, kw_only=True)
class NoEdit:
    """No settings; every edit is empty."""

    max_batch_size: ClassVar[int | None] = None

    name: str

    def settings(self) -> Mapping[str, Any]:
        """Return nothing: an empty edit depends on nothing."""
        return {}

    def check(self, model: ModelDescription) -> None:
        """Accept every model."""

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes."""
        return Footprint()

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor."""
        return Editor()


@dataclass(frozen=True, kw_only=True)
class Editor:
    """Writes nothing, of any number of facts."""

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the empty edit."""
        return Edit(deltas=())
