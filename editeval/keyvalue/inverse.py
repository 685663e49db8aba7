"""C^-1 of each layer, formed once in float64 and kept: methods that solve in several layers at every edit need it.

A solve with a Cholesky factor costs several times a product with the inverse (6400 wide: 0.3 s against 0.05 s on one core), and
methods that spread an edit solve once a layer. The inverse is formed from that factor and its residual is checked; where C is too badly
conditioned the factor is used instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.files import Cache, write_atomic
from editeval.keyvalue.covariance import CovarianceSource, covariance_factors, key_covariances
from editeval.keyvalue.solve import IllConditionedError, KeySolver, factorise
from editeval.models.model import LanguageModel
from editeval.types import Progress, content_key


@dataclass(frozen=True, kw_only=True, eq=False)
class CovarianceInverse:
    """C^-1 (K, K), float64."""

    matrix: Tensor

    def solve(self, keys_KB: Tensor) -> Tensor:
        """Return C^-1 @ keys (K, B) in float64, on the inverse's device."""
        return self.matrix @ keys_KB.to(self.matrix.device, torch.float64)


def covariance_solvers(
    lm: LanguageModel, sites: Sequence[str], source: CovarianceSource, cache: Cache, progress: Progress
) -> dict[str, KeySolver]:
    """Return what solves with C at each site, on the device of the site; made once, then read from the cache.

    The model must be in its unedited state.

    Raises:
        ConfigError: see `key_covariances`.
    """
    paths = {site: cache.path("covariance-inverse", _key(lm, site, source), ".safetensors") for site in sites}
    missing = [site for site in sites if not paths[site].exists()]
    covariances = key_covariances(lm, missing, source, cache, progress) if missing else {}
    solvers: dict[str, KeySolver] = {}
    for site in progress.track(sites, description="inverting covariances", total=len(sites)) if missing else sites:
        device = lm.device_at(site)
        if site in covariances:
            factor = factorise(covariances.pop(site).to(device))
            if factor.ridge > 0:
                progress.message(f"covariance of {site}: a ridge of {factor.ridge:.2e} was needed to make it positive definite")
            try:
                write_atomic(paths[site], save({"inverse": factor.inverse().cpu().contiguous()}))
            except IllConditionedError:
                solvers[site] = covariance_factors(lm, [site], source, cache, progress)[site]
                continue
        # What was just computed is read back, so that a first run and a later one use the same bits.
        solvers[site] = CovarianceInverse(matrix=load_file(paths[site])["inverse"].to(device))
    return solvers


def _key(lm: LanguageModel, site: str, source: CovarianceSource) -> str:
    return content_key({"model": lm.fingerprint, "site": site, **source.settings()})
