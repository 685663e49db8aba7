"""EMMET: ROME's equality constraint for a batch of facts.

Gupta et al. 2024, "A Unified Framework for Model Editing", arXiv:2403.14236.

    python launch.py method=emmet num_edits=10 batch_size=5

W changes least for other keys (second moment C) while every key of the batch maps exactly to its value (equation 9):

    dW = R (K^T C^-1 K)^-1 K^T C^-1

The published code adds `ridge` to the diagonal of K^T (weight C)^-1 K, so that keys of several facts that are nearly alike can be told
apart; 0 is the equation itself, and so is an edit of one fact. One layer is published; several are spread over as MEMIT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.footprint import INVERSE, Solver
from editeval.keyvalue.inverse import covariance_solvers
from editeval.keyvalue.settings import SpreadSettings
from editeval.keyvalue.solve import DependentKeysError, regularised_keys
from editeval.keyvalue.spread import SpreadEditor
from editeval.types import ConfigError, Progress

CONSTRAINT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class EMMET(SpreadSettings):
    """EMMET's settings; published numbers are in conf/method/emmet.yaml and conf/tuned/emmet."""

    published_depths: ClassVar[tuple[float, ...]] = (17 / 48,)  # layer 17 of GPT-2 XL's 48
    solver: ClassVar[Solver] = INVERSE

    covariance_weight: float
    ridge: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.covariance_weight > 0:
            raise ConfigError(f"covariance_weight={self.covariance_weight} must be above 0; set method.covariance_weight")
        if self.ridge < 0:
            raise ConfigError(f"ridge={self.ridge} must not be negative; set method.ridge")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        return {**self.shared_settings(), "covariance_weight": self.covariance_weight, "ridge": self.ridge}

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> SpreadEditor:
        """Return the editor; prefixes and covariances are of the unedited model and come from the cache if they are there."""
        lm = model.lm
        layers = self.layers_of(lm.description)
        self.announce(layers, lm.description, progress)
        with model.unedited():
            contexts = self.contexts(lm, cache)
            sites = [lm.sites.mlp_out.format(layer) for layer in layers]
            solvers = covariance_solvers(lm, sites, self.covariance_source, cache, progress)

        def solve(site: str, keys_KE: Tensor) -> Tensor:
            # With C scaled by the weight, the ridge on K^T (weight C)^-1 K becomes ridge * weight on K^T C^-1 K.
            ridge = self.ridge * self.covariance_weight if keys_KE.shape[1] > 1 else 0.0
            solved_KE = regularised_keys(solvers[site], keys_KE, weight=ridge)
            if ridge == 0:
                _check_constraint(keys_KE, solved_KE)
            return solved_KE

        return self.editor(lm, contexts, layers, solve)


def _check_constraint(keys_KE: Tensor, solved_KE: Tensor) -> None:
    """Check that every key is mapped to its own value, A^T K = I; keys that are linearly dependent cannot be."""
    mapped_EE = solved_KE.T @ keys_KE.to(solved_KE.device)
    error = float((mapped_EE - torch.eye(len(mapped_EE), dtype=mapped_EE.dtype, device=mapped_EE.device)).abs().max())
    if not error < CONSTRAINT_TOLERANCE:
        raise DependentKeysError(f"A^T K differs from I by {error:.1e}")
