"""MEMIT: write any number of facts together, spread over the MLP output matrices of several layers.

Meng et al. 2023, "Mass-Editing Memory in a Transformer", arXiv:2210.07229.

    python launch.py method=memit num_edits=10 batch_size=5

Target values are optimised for the residual stream after the last of `layers`. Each layer, from below, then takes 1/n of what is still
missing (n layers left), with keys K computed anew after the layer below was updated (equations 14 and 20):

    dW = R K^T (lambda C + K K^T)^-1,   R = (Z - V) / n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.footprint import INVERSE, Solver
from editeval.keyvalue.inverse import covariance_solvers
from editeval.keyvalue.settings import SpreadSettings
from editeval.keyvalue.solve import regularised_keys
from editeval.keyvalue.spread import SpreadEditor
from editeval.types import ConfigError, Progress

PUBLISHED_WEIGHT = 20000 / 6400  # lambda for GPT-2 XL, over the width of its keys


@dataclass(frozen=True, kw_only=True)
class MEMIT(SpreadSettings):
    """MEMIT's settings; published numbers are in conf/method/memit.yaml and conf/tuned/memit.

    `covariance_weight` is lambda; None scales the published one to the width of this model's keys.
    """

    published_depths: ClassVar[tuple[float, ...]] = (13 / 48, 17 / 48)  # layers 13 to 17 of GPT-2 XL's 48
    solver: ClassVar[Solver] = INVERSE

    covariance_weight: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.covariance_weight is not None and not self.covariance_weight > 0:
            raise ConfigError(f"covariance_weight={self.covariance_weight} must be above 0; set method.covariance_weight")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        return {**self.shared_settings(), "covariance_weight": self.covariance_weight}

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> SpreadEditor:
        """Return the editor; prefixes and covariances are of the unedited model and come from the cache if they are there."""
        lm = model.lm
        layers = self.layers_of(lm.description)
        self.announce(layers, lm.description, progress)
        weight = self.covariance_weight
        if weight is None:
            weight = PUBLISHED_WEIGHT * lm.description.intermediate_size
            progress.message(f"method.covariance_weight is not set: {weight:g}, the published weight for each dimension of the key")
        with model.unedited():
            contexts = self.contexts(lm, cache)
            sites = [lm.sites.mlp_out.format(layer) for layer in layers]
            solvers = covariance_solvers(lm, sites, self.covariance_source, cache, progress)

        def solve(site: str, keys_KE: Tensor) -> Tensor:
            return regularised_keys(solvers[site], keys_KE, weight=weight)

        return self.editor(lm, contexts, layers, solve)
