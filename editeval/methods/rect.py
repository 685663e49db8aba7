"""RECT: of another method's update, keep the elements that change their weight most, relative to what it was.

Gu et al. 2024, "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue", arXiv:2401.04700, section 6.

    python launch.py method=rect method@of=memit num_edits=10

With W the weights just before the edit, an element of dW stays if |dW_ij / W_ij| is among the largest `keep` of its matrix; the others
become 0. What stays has no low rank: the journal holds the update's factors and a bit a weight for what is kept of their product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editeval.edits.delta import DenseDelta, Edit, LowRankDelta, WeightDelta
from editeval.edits.dense import dense, num_bytes, selected_delta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import Editor as InnerEditor
from editeval.interfaces import FollowsMethod
from editeval.keyvalue.footprint import FLOAT32
from editeval.keyvalue.updates import joined_by_parameter, weight_deltas
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload


@dataclass(frozen=True, kw_only=True)
class RECT(FollowsMethod):
    """`of` is the method that is regularised; `keep` the share of an update's elements that stays."""

    keep: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep} must be above 0 and at most 1; set method.keep")

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the method that it regularises, and its own."""
        return {**super().settings(), "keep": self.keep}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint | None:
        """Predict what the method that it regularises needs, if that can say: a bit a weight beside each update of low rank."""
        needs = super().footprint(model, workload)
        if needs is None:
            return None
        elements = sum(d_out * d_in for d_out, d_in in needs.edited)
        whole = elements * FLOAT32
        kept = min(whole + needs.auxiliary_bytes, needs.journal_bytes + elements // 8) if needs.low_rank else whole + needs.auxiliary_bytes
        # On the host: the updates, what is kept of them, and the relative changes of one matrix while they are ranked.
        return replace(needs, journal_bytes=kept, host_bytes=needs.host_bytes + 3 * whole)

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
        whole = joined_by_parameter(weight_deltas(edit.deltas, requests))
        kept = {name: _kept(update, self.model.weight(name), share=self.keep) for name, update in whole.items()}
        diagnostics = {**edit.diagnostics, "update_norm_whole": _norm(whole.values()), "update_norm": _norm(kept.values())}
        return Edit(deltas=tuple(kept.values()), auxiliary=edit.auxiliary, diagnostics=diagnostics)


def _kept(update: WeightDelta, weight_OI: Tensor, *, share: float) -> WeightDelta:
    """Return the update with all but the largest relative changes set to 0; a weight of 0 changes without limit.

    The elements are ranked on the weight's device.
    """
    update_OI = dense(update, weight_OI.device)
    relative = torch.where(update_OI == 0, 0.0, (update_OI / weight_OI).abs()).flatten()
    dropped = relative.numel() - max(1, round(share * relative.numel()))
    if dropped == 0:
        return update
    selected_OI = (relative > relative.kthvalue(dropped).values).view_as(update_OI)
    if isinstance(update, LowRankDelta):
        selected = selected_delta(update, selected_OI)
        if num_bytes(selected) < update_OI.nbytes:
            return selected
    return DenseDelta(parameter=update.parameter, value=torch.where(selected_OI, update_OI, 0.0).cpu())


def _norm(updates: Iterable[WeightDelta]) -> float:
    return float(sum(dense(update).double().square().sum() for update in updates) ** 0.5)
