"""Updates that keep what a layer does with other keys: a projection onto directions that text hardly uses, and a memory of edited keys.

AlphaEdit (Fang et al. 2025, arXiv:2410.02355): P projects onto the eigenvectors of C = E[k k^T] whose eigenvalue is below a threshold. With
the keys K_p of earlier edits, an edit's keys K and a ridge r, the update dW = R A^T has (section 3.3, equation 14)

    A = (P K (P K)^T + P K_p (P K_p)^T + r I)^-1 P K

Shapes: K the key's width, M the kept directions, N earlier keys, B keys of this edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from editeval.files import Cache, write_atomic
from editeval.keyvalue.covariance import CovarianceSource, key_covariances
from editeval.models.model import LanguageModel
from editeval.types import Progress, content_key

FOLD_KEYS = 512
"""Earlier keys that are held one by one; as many are then folded into one matrix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NullSpace:
    """P, by an orthonormal basis of what it keeps or of what it removes, whichever is smaller (float64)."""

    basis: Tensor
    keeps: bool
    kept: int

    def project(self, keys_KB: Tensor) -> Tensor:
        """Return P @ keys (K, B) in float64."""
        keys_KB = keys_KB.to(self.basis.device, torch.float64)
        part_KB = self.basis @ (self.basis.T @ keys_KB)
        return part_KB if self.keeps else keys_KB - part_KB


def null_space(covariance_KK: Tensor, *, threshold: float | None, share: float) -> NullSpace:
    """Return the projection onto the eigenvectors of C whose eigenvalue is below `threshold`.

    Without a threshold it keeps `share` of all directions, those of the smallest eigenvalues.
    """
    values, vectors = torch.linalg.eigh(covariance_KK.to(torch.float64))
    kept = int(share * len(values)) if threshold is None else int((values < threshold).sum())
    keeps = kept <= len(values) // 2
    basis_KM = vectors[:, :kept] if keeps else vectors[:, kept:]
    return NullSpace(basis=basis_KM.contiguous(), keeps=keeps, kept=kept)


def null_spaces(
    lm: LanguageModel,
    sites: Sequence[str],
    source: CovarianceSource,
    cache: Cache,
    progress: Progress,
    *,
    threshold: float | None,
    share: float,
) -> dict[str, NullSpace]:
    """Return the projection of each site (see `null_space`), on the site's device; made once, then read from the cache.

    The model must be in its unedited state.

    Raises:
        ConfigError: see `key_covariances`.
    """
    settings = {"threshold": threshold, "share": None if threshold is not None else share, **source.settings()}
    paths = {
        site: cache.path("null-space", content_key({"model": lm.fingerprint, "site": site, **settings}), ".safetensors") for site in sites
    }
    missing = [site for site in sites if not paths[site].exists()]
    covariances = key_covariances(lm, missing, source, cache, progress) if missing else {}
    for site in progress.track(missing, description="null spaces", total=len(missing)) if missing else ():
        covariance = covariances.pop(site).to(lm.device_at(site))
        found = null_space(covariance, threshold=threshold, share=share)
        flags = torch.tensor([int(found.keeps), found.kept])
        write_atomic(paths[site], save({"basis": found.basis.cpu().contiguous(), "flags": flags}))
    spaces: dict[str, NullSpace] = {}
    for site in sites:
        stored = load_file(paths[site])
        keeps, kept = stored["flags"].tolist()
        basis_KM = stored["basis"].to(lm.device_at(site))
        spaces[site] = NullSpace(basis=basis_KM, keeps=bool(keeps), kept=kept)
    return spaces


class KeyMemory:
    """(r I + sum of p p^T over projected earlier keys)^-1, as far as an edit needs it; rank-b work an edit.

    The first keys are held one by one, with the Cholesky factor of their small system, which grows row by row. Every FOLD_KEYS keys
    are folded into one (K, K) matrix. What it holds depends on the keys and their grouping alone: absorbing them again gives the same bits.
    """

    def __init__(self, *, ridge: float) -> None:
        self._ridge = ridge
        self._folded_KK: Tensor | None = None
        self._keys_NK: Tensor | None = None
        self._solved_NK: Tensor | None = None
        self._factor_NN: Tensor | None = None
        self._held = 0

    def solve(self, keys_KB: Tensor) -> Tensor:
        """Return (r I + P K_p (P K_p)^T + K K^T)^-1 K (K, B) for the projected keys of a new edit, float64."""
        solved_KB = self._apply(keys_KB)
        small_BB = keys_KB.T @ solved_KB
        small_BB = small_BB + torch.eye(len(small_BB), dtype=small_BB.dtype, device=small_BB.device)
        update_BK: Tensor = torch.linalg.solve(small_BB, solved_KB.T)
        return update_BK.T

    def absorb(self, keys_KB: Tensor) -> None:
        """Count these projected keys (float64) as earlier ones from now on."""
        start, stop = self._held, self._held + keys_KB.shape[1]
        keys_NK, solved_NK, factor_NN = self._room_for(stop, keys_KB)
        base_KB = self._base(keys_KB)
        keys_NK[start:stop] = keys_KB.T
        solved_NK[start:stop] = base_KB.T
        corner_BB = keys_KB.T @ base_KB
        corner_BB = corner_BB + torch.eye(len(corner_BB), dtype=corner_BB.dtype, device=corner_BB.device)
        if start:
            cross_NB = keys_NK[:start] @ base_KB
            rows_BN = torch.linalg.solve_triangular(factor_NN[:start, :start], cross_NB, upper=False).T
            factor_NN[start:stop, :start] = rows_BN
            corner_BB = corner_BB - rows_BN @ rows_BN.T
        factor_NN[start:stop, start:stop] = torch.linalg.cholesky(corner_BB)
        self._held = stop
        if stop >= FOLD_KEYS:
            self._fold(keys_KB.shape[0])

    def _apply(self, keys_KB: Tensor) -> Tensor:
        """Return (r I + sum p p^T)^-1 keys over everything absorbed (Woodbury)."""
        base_KB = self._base(keys_KB)
        if not self._held or self._solved_NK is None or self._factor_NN is None:
            return base_KB
        solved_NK, factor_NN = self._solved_NK[: self._held], self._factor_NN[: self._held, : self._held]
        return base_KB - solved_NK.T @ torch.cholesky_solve(solved_NK @ keys_KB, factor_NN)

    def _base(self, keys_KB: Tensor) -> Tensor:
        return keys_KB / self._ridge if self._folded_KK is None else self._folded_KK @ keys_KB

    def _room_for(self, size: int, like_KB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width, capacity = like_KB.shape[0], max(size, FOLD_KEYS)
        if self._keys_NK is None or self._solved_NK is None or self._factor_NN is None or len(self._keys_NK) < capacity:
            old = (self._keys_NK, self._solved_NK, self._factor_NN)
            self._keys_NK, self._solved_NK = like_KB.new_zeros(capacity, width), like_KB.new_zeros(capacity, width)
            self._factor_NN = like_KB.new_zeros(capacity, capacity)
            if old[0] is not None and old[1] is not None and old[2] is not None:
                held = self._held
                self._keys_NK[:held], self._solved_NK[:held] = old[0][:held], old[1][:held]
                self._factor_NN[:held, :held] = old[2][:held, :held]
        return self._keys_NK, self._solved_NK, self._factor_NN

    def _fold(self, width: int) -> None:
        assert self._solved_NK is not None
        assert self._factor_NN is not None
        factor_NN = self._factor_NN[: self._held, : self._held]
        half_NK = torch.linalg.solve_triangular(factor_NN, self._solved_NK[: self._held], upper=False)
        if self._folded_KK is None:
            self._folded_KK = torch.eye(width, dtype=half_NK.dtype, device=half_NK.device) / self._ridge
        self._folded_KK.addmm_(half_NK.T, half_NK, alpha=-1.0)
        self._keys_NK = self._solved_NK = self._factor_NN = None
        self._held = 0
