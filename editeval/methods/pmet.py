"""PMET: MEMIT with target values for attention and MLP apart, and a slower spread.

Li et al. 2024, "PMET: Precise Model Editing in a Transformer", arXiv:2308.08742.

    python launch.py method=pmet num_edits=10
    python launch.py method=pmet method.edit=both num_edits=10

Two deltas are optimised together at the last of `layers`, one at the output of attention and one at that of the MLP, so that the MLP's
does not carry what attention should do. Each layer takes 1/sqrt(n) of what is missing (n layers left). The paper writes the MLP's part
alone (`edit=mlp`); `edit=both` also writes the attention's, whose update the MLP of the same layer then sees.

In the authors' code (github.com/xpq-tech/PMET) the optimisation eases off once the fact is written behind every prefix: the target then
counts a tenth, and with a small enough KL term the steps end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.footprint import INVERSE, MapShape, Solver, attention_maps
from editeval.keyvalue.inverse import covariance_solvers
from editeval.keyvalue.objective import TargetSettings
from editeval.keyvalue.settings import SpreadSettings
from editeval.keyvalue.solve import regularised_keys
from editeval.keyvalue.spread import SpreadEditor, Target
from editeval.models.sites import sites_for
from editeval.types import ConfigError, ModelDescription, Progress

PUBLISHED_WEIGHT = 15000 / 6400  # lambda for GPT-2 XL, over the width of its MLP's keys

WRITES: Mapping[str, str] = {
    "mlp": "as published: the MLP's output matrices",
    "both": "the output matrices of attention and MLP",
}


@dataclass(frozen=True, kw_only=True)
class PMET(SpreadSettings):
    """PMET's settings; published numbers are in conf/method/pmet.yaml and conf/tuned/pmet.

    `edit` is one of `WRITES`. `covariance_weight` is lambda; None scales the published one to the width of each map's keys. For
    `written_nll_factor` and `written_kl` see `TargetSettings`.
    """

    published_depths: ClassVar[tuple[float, ...]] = (13 / 48, 17 / 48)  # layers 13 to 17 of GPT-2 XL's 48
    solver: ClassVar[Solver] = INVERSE

    edit: str
    covariance_weight: float | None
    written_nll_factor: float | None
    written_kl: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edit not in WRITES:
            raise ConfigError(f"method.edit={self.edit!r} is unknown; choose one of {', '.join(WRITES)}")
        if self.covariance_weight is not None and not self.covariance_weight > 0:
            raise ConfigError(f"covariance_weight={self.covariance_weight} must be above 0; set method.covariance_weight")

    @property
    def target_settings(self) -> TargetSettings:
        """How target values are optimised."""
        return replace(super().target_settings, written_nll_factor=self.written_nll_factor, written_kl=self.written_kl)

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        return {**self.shared_settings(), "edit": self.edit, "covariance_weight": self.covariance_weight}

    def maps_of(self, model: ModelDescription, count: int) -> list[MapShape]:
        """Return what is edited in `count` layers."""
        return super().maps_of(model, count) + (attention_maps(model, count) if self.edit == "both" else [])

    def key_widths(self, model: ModelDescription) -> dict[str, int]:
        """Return how wide the keys are at each map (module path) whose second moments are needed."""
        path = sites_for(model.model_type).attention_out
        attention = {path.format(layer): model.attention_width for layer in self.layers_of(model)} if self.edit == "both" else {}
        return super().key_widths(model) | attention

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> SpreadEditor:
        """Return the editor; prefixes and covariances are of the unedited model and come from the cache if they are there."""
        lm = model.lm
        layers = self.layers_of(lm.description)
        self.announce(layers, lm.description, progress)
        if self.covariance_weight is None:
            progress.message(f"method.covariance_weight is not set: {PUBLISHED_WEIGHT:g} for each dimension of the key, as published")
        # Attention comes first: within a layer, it is what the MLP reads.
        edited = (lm.sites.attention_out, lm.sites.mlp_out) if self.edit == "both" else (lm.sites.mlp_out,)
        with model.unedited():
            contexts = self.contexts(lm, cache)
            sites = [path.format(layer) for path in edited for layer in layers]
            solvers = covariance_solvers(lm, sites, self.covariance_source, cache, progress)

        def solve(site: str, keys_KE: Tensor) -> Tensor:
            weight = PUBLISHED_WEIGHT * len(keys_KE) if self.covariance_weight is None else self.covariance_weight
            return regularised_keys(solvers[site], keys_KE, weight=weight)

        return SpreadEditor(
            lm=lm,
            contexts=contexts,
            group_sizes=self.group_sizes,
            layers=layers,
            optimised=(lm.sites.mlp_out, lm.sites.attention_out),
            targets=tuple(Target(edited=path, moved=path) for path in edited),
            share=lambda left: left**-0.5,
            solve=solve,
            target_settings=self.target_settings,
        )
