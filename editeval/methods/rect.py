"""RECT: of another method's update, keep the elements that change their weight most, relative to what it was.

Gu et al. 2024, "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue", arXiv:2401.04700, section 6.

    python launch.py method=rect method@of=memit num_edits=10

With W the weights just before the edit, an element of dW stays if |dW_ij / W_ij| is among the largest `keep` of its matrix; the others
become 0. What stays has no low rank, so an edit takes 4 bytes a weight in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editeval.edits.delta import Delta, DenseDelta, Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, Predictable, UsesStatistics
from editeval.interfaces import Editor as InnerEditor
from editeval.keyvalue.footprint import FLOAT32
from editeval.keyvalue.updates import dense_by_parameter, weight_deltas
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload


@dataclass(frozen=True, kw_only=True)
class RECT:
    """`of` is the method that is regularised; `keep` the share of an update's elements that stays."""

    name: str
    of: EditMethod
    keep: float

    def __post_init__(self) -> None:
        if not isinstance(self.of, EditMethod):
            raise ConfigError(f"method.of is {self.of!r}, no editing method; choose one, such as method@of=memit")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep} must be above 0 and at most 1; set method.keep")

    @property
    def max_batch_size(self) -> int | None:
        """As the method that it regularises."""
        return self.of.max_batch_size

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the method that it regularises, and its own."""
        return {"of": self.of.settings(), "class": type(self.of).__qualname__, "keep": self.keep}

    def check(self, model: ModelDescription) -> None:
        """Check the method that it regularises."""
        self.of.check(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint | None:
        """Predict what the method that it regularises needs, if that can say, with a whole matrix in the place of each update."""
        needs = self.of.footprint(model, workload) if isinstance(self.of, Predictable) else None
        if needs is None:
            return None
        whole = sum(d_out * d_in for d_out, d_in in needs.edited) * FLOAT32
        # On the host: the updates, what is kept of them, and the relative changes of one matrix while they are ranked.
        return replace(needs, journal_bytes=whole + needs.auxiliary_bytes, host_bytes=needs.host_bytes + 3 * whole)

    def missing_statistics(self, model: ModelDescription, fingerprint: str | None, cache: Cache) -> tuple[str, ...]:
        """Return what the method that it regularises must compute first."""
        return self.of.missing_statistics(model, fingerprint, cache) if isinstance(self.of, UsesStatistics) else ()

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor."""
        return Editor(model=model, inner=self.of.prepare(model, cache, progress), keep=self.keep)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """RECT bound to a model."""

    model: EditedModel
    inner: InnerEditor
    keep: float

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return what is kept of the updates that write these facts; what the method remembers is kept whole.

        Raises:
            EditError: the method cannot compute its edit, or changes no weights.
        """
        edit = self.inner.edit(requests, seed=seed)
        whole = dense_by_parameter(weight_deltas(edit.deltas, requests))
        kept = {name: _kept(value, self.model.weight(name).cpu(), share=self.keep) for name, value in whole.items()}
        deltas: tuple[Delta, ...] = tuple(DenseDelta(parameter=name, value=value) for name, value in kept.items())
        diagnostics = {**edit.diagnostics, "update_norm_whole": _norm(whole), "update_norm": _norm(kept)}
        return Edit(deltas=deltas, auxiliary=edit.auxiliary, diagnostics=diagnostics)


def _kept(update_OI: Tensor, weight_OI: Tensor, *, share: float) -> Tensor:
    """Return the update (float32) with all but the largest relative changes set to 0; a weight of 0 changes without limit."""
    relative = torch.where(update_OI == 0, 0.0, (update_OI / weight_OI).abs()).flatten()
    dropped = relative.numel() - max(1, round(share * relative.numel()))
    if dropped == 0:
        return update_OI.contiguous()
    limit = relative.kthvalue(dropped).values
    return torch.where((relative > limit).view_as(update_OI), update_OI, 0.0).contiguous()


def _norm(updates: Mapping[str, Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in updates.values()) ** 0.5)
