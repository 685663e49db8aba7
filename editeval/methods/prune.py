"""PRUNE: another method's edits, with the singular values of their sum kept near those of the unedited matrix.

Ma et al. 2025, "Perturbation-Restrained Sequential Model Editing", arXiv:2405.16821.

    python launch.py method=prune method@of=memit num_edits=100

S is the sum of all updates of a matrix so far, s_max the largest singular value of the unedited matrix W0. The model gets W0 + F(S),
where F changes the singular values s of S that are above s_max into

    F(s) = log_alpha(s) - log_alpha(s_max) + s_max

(section 4.2), alpha = `log_base`; where s_max is so small that this would be more than s, s stays. The method itself goes on from W0 + S,
so the state after n edits is what the published procedure, which restrains once, makes of n edits.

F(S) = S - C with C of the rank of what is above s_max. An edit is recorded as the method's own update, minus the new C, plus the old one;
C is part of it (`auxiliary`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from editeval.edits.delta import Delta, Edit, LowRankDelta
from editeval.edits.dense import dense
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import Editor as InnerEditor
from editeval.interfaces import FollowsMethod
from editeval.keyvalue.footprint import FLOAT32, FLOAT64
from editeval.keyvalue.updates import joined_by_parameter, weight_deltas
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload

PREFIX = "prune"
RESTRAINED_VALUES = 1 / 3  # the rank of C: 1 on one of three models of the tests; a sum that grows without bound has more
EIGENVECTOR_OPERATIONS = 10.0  # of a symmetric (n, n) matrix, times n^3


@dataclass(frozen=True, kw_only=True)
class PRUNE(FollowsMethod):
    """`of` is the method that is restrained; `log_base` the base of the logarithm that singular values above the limit follow."""

    log_base: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_base > 1:
            raise ConfigError(f"log_base={self.log_base} must be above 1; set method.log_base")

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the method that it restrains, and its own."""
        return {**super().settings(), "log_base": self.log_base}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint | None:
        """Predict what the method that it restrains needs, if that can say, and the sums of its updates. The rank of C is an assumption."""
        needs = super().footprint(model, workload)
        if needs is None:
            return None
        # The sum, the unedited matrix or the update, and of the shorter side the product, its eigenvectors and their scratch.
        host = max((2 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, d_in in needs.edited), default=0) * FLOAT64
        work = sum(2.0 * d_out * d_in * min(d_out, d_in) + EIGENVECTOR_OPERATIONS * min(d_out, d_in) ** 3 for d_out, d_in in needs.edited)
        excess = round(RESTRAINED_VALUES * sum(d_out + d_in for d_out, d_in in needs.edited) * FLOAT32)
        return replace(
            needs,
            host_bytes=needs.host_bytes + host,
            journal_bytes=needs.journal_bytes + 3 * excess,  # the new one, the one before it, and the new one to remember
            auxiliary_bytes=needs.auxiliary_bytes + excess,
            edit_operations=needs.edit_operations + work,
        )

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor."""
        return Editor(model=model, inner=self.of.prepare(model, cache, progress), log_base=self.log_base)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """PRUNE bound to a model. `limits` holds the largest singular values of unedited matrices, as they are needed."""

    model: EditedModel
    inner: InnerEditor
    log_base: float
    limits: dict[str, float] = field(default_factory=dict)

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the step from the restrained sum of the edits so far to the restrained sum with these facts.

        Raises:
            EditError: the method cannot compute its edit, or changes no weights.
        """
        before = self._excesses()
        with self._unrestrained(before):
            edit = self.inner.edit(requests, seed=seed)
        updates = weight_deltas(edit.deltas, requests)
        after = dict(before)
        for parameter, update in joined_by_parameter(updates).items():
            sum_OI = self._sum(parameter, before)
            excess = self._excess(parameter, sum_OI + dense(update, sum_OI.device).double())
            after.pop(parameter, None)
            if excess is not None:
                after[parameter] = excess
        edited = {delta.parameter for delta in updates}
        steps: list[Delta] = [*updates]
        steps += [_negative(excess) for name, excess in after.items() if name in edited]
        steps += [excess for name, excess in before.items() if name in edited]
        removed = sum(float(dense(excess).norm()) ** 2 for excess in after.values()) ** 0.5
        diagnostics = {
            **edit.diagnostics,
            "restrained_values": float(sum(each.left.shape[1] for each in after.values())),
            "removed_norm": removed,
        }
        return Edit(deltas=tuple(steps), auxiliary={**edit.auxiliary, **_recorded(after)}, diagnostics=diagnostics)

    def _excesses(self) -> dict[str, LowRankDelta]:
        """Return C by parameter, as the last edit in the model left it."""
        last = self.model.auxiliary[-1] if self.model.auxiliary else {}
        names = [name.removeprefix(f"{PREFIX}.left.") for name in last if name.startswith(f"{PREFIX}.left.")]
        return {
            name: LowRankDelta(parameter=name, left=last[f"{PREFIX}.left.{name}"], right=last[f"{PREFIX}.right.{name}"]) for name in names
        }

    def _sum(self, parameter: str, excesses: Mapping[str, LowRankDelta]) -> Tensor:
        """Return S (d_out, d_in), float64 on the weight's device: what the model has more than the unedited one, and what was taken off."""
        found = self.model.weight(parameter).double() - self.model.base_weight(parameter).double()
        return found + dense(excesses[parameter], found.device).double() if parameter in excesses else found

    def _excess(self, parameter: str, sum_OI: Tensor) -> LowRankDelta | None:
        """Return C = S - F(S), on the CPU, or None where no singular value is above the limit."""
        if parameter not in self.limits:
            base = self.model.base_weight(parameter).double()
            self.limits[parameter] = float(torch.linalg.eigvalsh(_gram(base))[-1].clamp(min=0).sqrt())
        limit = self.limits[parameter]
        norm = float(sum_OI.norm())
        if not limit < norm < float("inf"):
            return None  # no singular value is larger than the Frobenius norm; what is not finite is for the runner to judge
        tall = sum_OI.shape[0] > sum_OI.shape[1]
        squares, vectors = torch.linalg.eigh(_gram(sum_OI))
        values = squares.clamp(min=0).sqrt()
        excess = excess_of(values, limit=limit, log_base=self.log_base)
        chosen = excess > 0
        if not bool(chosen.any()):
            return None
        one_side = vectors[:, chosen]
        left, right = (sum_OI @ one_side / values[chosen], one_side.T) if tall else (one_side, one_side.T @ sum_OI / values[chosen, None])
        factors = ((left * excess[chosen]).float().cpu(), right.float().cpu())
        return LowRankDelta(parameter=parameter, left=factors[0].contiguous(), right=factors[1].contiguous())

    def _unrestrained(self, excesses: Mapping[str, LowRankDelta]) -> AbstractContextManager[None]:
        """Within the context the model holds W0 + S."""
        weights = {name: self.model.weight(name) for name in excesses}
        return self.model.holding({name: weight + dense(excesses[name]).to(weight.device) for name, weight in weights.items()})


def excess_of(values: Tensor, *, limit: float, log_base: float) -> Tensor:
    """Return how much is taken off singular values: s - F(s) above the limit, 0 below it and where F(s) would be more than s."""
    base = torch.tensor(log_base, dtype=values.dtype, device=values.device)
    allowed = limit + (values / limit).clamp(min=1).log() / base.log()
    return (values - allowed).clamp(min=0) * (values > limit)


def _gram(matrix_OI: Tensor) -> Tensor:
    """Return the product of a matrix with itself over its longer side."""
    return matrix_OI.T @ matrix_OI if matrix_OI.shape[0] > matrix_OI.shape[1] else matrix_OI @ matrix_OI.T


def _negative(delta: LowRankDelta) -> LowRankDelta:
    return LowRankDelta(parameter=delta.parameter, left=-delta.left, right=delta.right)


def _recorded(excesses: Mapping[str, LowRankDelta]) -> dict[str, Tensor]:
    lefts = {f"{PREFIX}.left.{name}": excess.left for name, excess in excesses.items()}
    return {**lefts, **{f"{PREFIX}.right.{name}": excess.right for name, excess in excesses.items()}}
