"""ROME: write one fact into one MLP output matrix by a rank-one update.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv:2202.05262.

    python launch.py method=rome num_edits=10

The matrix W of layer `layer` maps a key k (of the subject's last token) to a value. With C = E[k k^T] over text, the update

    W' = W + (v - W k_e) u^T / (u . k_e),   u = C^-1 k_*

gives W' k_e = v while changing W least for other keys (equation 2). k_* is the mean key over context prefixes, v the value that
makes the model say the target (equation 4). Which key stands where is what the later variants change; see `KEYS`. R-ROME and C-ROME
found the same remedy: with k_e = k_* the divisor k_*^T C^-1 k_* is positive and never small beside the numerator. What C-ROME adds, a
random prefix before a prompt that begins with its subject, is done when the model is asked, not when it is edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.covariance import covariance_factors
from editeval.keyvalue.footprint import FACTOR, NOTHING, locate_footprint, mlp_maps
from editeval.keyvalue.graphs import StepGraphs
from editeval.keyvalue.objective import TargetSettings
from editeval.keyvalue.settings import LocateSettings, chosen_layer
from editeval.keyvalue.solve import CholeskyFactor
from editeval.keyvalue.target_value import TargetValue, fact_rows, optimise
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.types import ConfigError, EditError, EditRequest, Footprint, ModelDescription, Progress, Workload

PUBLISHED_DEPTH = 17 / 48  # layer 17 of GPT-2 XL's 48, the model that the paper located facts in

KEYS: Mapping[str, str] = {
    "mean": "as published: u from the mean key, k_e the bare prompt's key",
    "consistent": "R-ROME (arXiv:2403.07175) and C-ROME (arXiv:2406.11263): the mean key in both places, and the mean value it maps to",
    "prompt": "p-ROME (arXiv:2403.07175): the bare prompt's key in both places",
}


@dataclass(frozen=True, kw_only=True)
class ROME(LocateSettings):
    """ROME's settings; published numbers are in conf/method/rome.yaml and conf/tuned/rome.

    `layer` None means the published relative depth. `use_covariance` false takes C = I (`mom2_adjustment: false` of later code).
    """

    max_batch_size: ClassVar[int | None] = 1

    layer: int | None
    key: str
    use_covariance: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key not in KEYS:
            raise ConfigError(f"method.key={self.key!r} is unknown; choose one of {', '.join(KEYS)}")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        covariance = self.covariance_source.settings() if self.use_covariance else None
        return {**self.value_settings(), "layer": self.layer, "key": self.key, "covariance": covariance}

    def key_widths(self, model: ModelDescription) -> dict[str, int]:
        """Return how wide the keys are at each map (module path) whose second moments are needed; none without a covariance."""
        site = sites_for(model.model_type).mlp_out.format(self._layer(model))
        return {site: model.intermediate_size} if self.use_covariance else {}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes."""
        solver = FACTOR if self.use_covariance else NOTHING
        return locate_footprint(self, model, workload, last_layer=self._layer(model), maps=mlp_maps(model, 1), solver=solver)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; prefixes and covariance are of the unedited model and come from the cache if they are there."""
        lm = model.lm
        layer = self._layer(lm.description)
        if self.layer is None:
            progress.message(f"method.layer is not set: editing layer {layer} of {lm.description.num_layers}, the published relative depth")
        if not self.use_covariance:
            progress.message("method.use_covariance=false: C = I, unlike the ROME of its paper")
        site = lm.sites.mlp_out.format(layer)
        with model.unedited():
            contexts = self.contexts(lm, cache)
            factor = covariance_factors(lm, [site], self.covariance_source, cache, progress)[site] if self.use_covariance else None
        return Editor(lm=lm, layer=layer, site=site, contexts=contexts, factor=factor, key=self.key, target_settings=self.target_settings)

    def _layer(self, model: ModelDescription) -> int:
        return chosen_layer(model, self.layer, published_depth=PUBLISHED_DEPTH)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """ROME bound to a model: its site, its context prefixes, the factor of its covariance."""

    lm: LanguageModel
    layer: int
    site: str
    contexts: tuple[str, ...]
    factor: CholeskyFactor | None
    key: str
    target_settings: TargetSettings
    graphs: StepGraphs = field(default_factory=StepGraphs)

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the rank-one update that writes one fact.

        Raises:
            EditError: more or fewer than one request, or one that cannot be encoded or optimised.
        """
        ids = [request.request_id for request in requests]
        if len(requests) != 1:
            raise EditError(f"ROME writes one fact an edit, got {len(requests)}; set batch_size=1, or choose method=memit", request_ids=ids)
        rows = fact_rows(self.lm.tokenizer, requests[0], self.contexts, max_tokens=self.lm.description.max_positions)
        settings = self.target_settings
        value = optimise(self.lm, [rows], layer=self.layer, sites=[self.site], settings=settings, graphs=self.graphs)[0]
        update = rank_one_update(value, self.site, factor=self.factor, key=self.key)
        size = float(update.left.norm() * update.right.norm())
        if not size > 0:
            raise EditError(f"the update of {self.site} is {size}, which changes nothing or everything", request_ids=ids)
        delta = LowRankDelta(parameter=f"{self.site}.weight", left=update.left[:, None], right=update.right[None, :])
        return Edit(deltas=(delta,), diagnostics=_diagnostics(value, self.site, size))


@dataclass(frozen=True, kw_only=True, eq=False)
class RankOne:
    """dW = left right^T: left (d_out) in the value's space, right (d_in) the unit vector u, float32."""

    left: Tensor
    right: Tensor


def rank_one_update(value: TargetValue, site: str, *, factor: CholeskyFactor | None, key: str) -> RankOne:
    """Solve for dW such that W + dW maps the key to the target value (ROME, equation 2); `key` is one of `KEYS`."""
    bare_key, bare_output = value.inputs[site][0], value.outputs[site][0]
    mean_key, mean_output = value.inputs[site].mean(dim=0), value.outputs[site].mean(dim=0)
    direction_key = bare_key if key == "prompt" else mean_key
    edited_key, edited_output = (mean_key, mean_output) if key == "consistent" else (bare_key, bare_output)
    direction = direction_key.double() if factor is None else factor.solve(direction_key[:, None])[:, 0].cpu()
    direction = direction / direction.norm()
    target = value.initial[site] + value.deltas[site]
    left = (target - edited_output).double() / (direction @ edited_key.double())
    return RankOne(left=left.to(torch.float32), right=direction.to(torch.float32))


def _diagnostics(value: TargetValue, site: str, update_norm: float) -> dict[str, float]:
    first, last = value.losses[0], value.losses[-1]
    return {
        "loss_first": first.total,
        "loss_last": last.total,
        "target_log_prob_first": -first.nll,
        "target_log_prob_last": -last.nll,
        "kl_last": last.kl,
        "evaluations": float(len(value.losses)),
        "value_norm": float(value.initial[site].norm()),
        "delta_norm": float(value.deltas[site].norm()),
        "update_norm": update_norm,
    }
