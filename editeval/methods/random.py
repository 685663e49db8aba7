"""The control that changes as much, at random: what is left of an effect when the edit's direction means nothing.

    python launch.py method=random method@of=memit num_edits=10

Computes the edit of another method (`of`) and replaces each of its updates by Gaussian noise of the same shape, rank and Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editeval.edits.delta import DenseDelta, Edit, LowRankDelta, WeightDelta
from editeval.edits.dense import dense
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import Editor as InnerEditor
from editeval.interfaces import FollowsMethod
from editeval.keyvalue.footprint import FLOAT32
from editeval.keyvalue.spread import update_norm
from editeval.keyvalue.updates import weight_deltas
from editeval.types import EditError, EditRequest, Footprint, ModelDescription, Progress, Workload, seed_for


@dataclass(frozen=True, kw_only=True)
class RandomEdit(FollowsMethod):
    """`of` is the method whose edits set size and rank."""

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint | None:
        """Predict memory, disk and operations as the method that it follows does, if that can; noise of full rank is a whole matrix."""
        needs = super().footprint(model, workload)
        if needs is None or needs.low_rank:
            return needs
        whole = sum(d_out * d_in for d_out, d_in in needs.edited) * FLOAT32
        return replace(needs, journal_bytes=whole + needs.auxiliary_bytes)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor."""
        return Editor(inner=self.of.prepare(model, cache, progress))


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """The control bound to a model."""

    inner: InnerEditor

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return random updates as large as those that would write these facts; what the method remembers is kept.

        Raises:
            EditError: the method cannot compute its edit, or changes no weights.
        """
        edit = self.inner.edit(requests, seed=seed)
        weights = weight_deltas(edit.deltas, requests)
        if not weights:
            raise EditError(
                "the method changes no weights, so nothing random can be as large", request_ids=[request.request_id for request in requests]
            )
        generator = torch.Generator().manual_seed(seed_for("random edit", seed))
        deltas = tuple(_random_like(delta, generator) for delta in weights)
        return Edit(deltas=deltas, auxiliary=edit.auxiliary, diagnostics=edit.diagnostics)


def _random_like(delta: WeightDelta, generator: torch.Generator) -> WeightDelta:
    if not isinstance(delta, LowRankDelta):  # of full rank, as far as anybody knows
        whole = dense(delta)
        value = _noise(whole, generator)
        return DenseDelta(parameter=delta.parameter, value=value * (whole.norm() / value.norm()))
    noise = LowRankDelta(parameter=delta.parameter, left=_noise(delta.left, generator), right=_noise(delta.right, generator))
    scale = update_norm(delta) / update_norm(noise)
    return LowRankDelta(parameter=delta.parameter, left=noise.left * scale, right=noise.right)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32)
