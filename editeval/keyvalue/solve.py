"""Solving with the second moment C of a layer's keys: one float64 Cholesky factor a layer, then rank-one work an edit.

C is positive semidefinite by construction; where rounding or too little text leaves it singular, the smallest ridge of a
fixed ladder that makes it factorise is added, and kept with the factor so that it can be reported.

Shapes: K the key's width, B keys at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from editeval.types import EditevalError

RIDGES = (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Ridges to try, as parts of C's mean diagonal."""

INVERSE_TOLERANCE = 1e-6


class DependentKeysError(EditevalError):
    """Keys that must be told apart are the same, or a sum of each other."""


class IllConditionedError(EditevalError):
    """A covariance whose inverse would be too inexact."""


class KeySolver(Protocol):
    """Solves with C: a factor of it, or its inverse."""

    def solve(self, keys_KB: Tensor) -> Tensor:
        """Return C^-1 @ keys (K, B) in float64."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CholeskyFactor:
    """C + ridge * I = lower @ lower^T, float64; `ridge` is in C's unit."""

    lower: Tensor
    ridge: float

    def solve(self, keys_KB: Tensor) -> Tensor:
        """Return C^-1 @ keys (K, B) in float64, on the factor's device."""
        keys_KB = keys_KB.to(self.lower.device, torch.float64)
        return torch.cholesky_solve(keys_KB, self.lower)

    def inverse(self) -> Tensor:
        """Return C^-1 (K, K) in float64, for where some dozen solves make it worth forming.

        Raises:
            IllConditionedError: C is too badly conditioned for an inverse; use `solve`.
        """
        inverse = torch.cholesky_inverse(self.lower)
        probe = torch.ones(len(inverse), 1, dtype=torch.float64, device=inverse.device)
        residual = float((self.lower @ (self.lower.T @ (inverse @ probe)) - probe).norm() / probe.norm())
        if not residual < INVERSE_TOLERANCE:
            raise IllConditionedError(
                f"the inverse of a key covariance leaves a residual of {residual:.1e}, allowed {INVERSE_TOLERANCE:.0e}; solve instead"
            )
        return inverse


def factorise(covariance_KK: Tensor) -> CholeskyFactor:
    """Factorise C (K, K) in float64, with the smallest ridge that it needs.

    Raises:
        EditevalError: not finite, all zero, or far from positive semidefinite.
    """
    matrix = covariance_KK.to(torch.float64)
    scale = float(matrix.diagonal().mean())
    if not bool(torch.isfinite(matrix).all()) or not scale > 0:
        raise EditevalError("the key covariance holds no positive finite numbers; check the corpus or the file that it came from")
    identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    for part in RIDGES:
        lower, info = torch.linalg.cholesky_ex(matrix + part * scale * identity)
        if int(info) == 0:
            return CholeskyFactor(lower=lower, ridge=part * scale)
    raise EditevalError(
        f"the key covariance is not positive definite, even with a ridge of {RIDGES[-1]} times its mean diagonal; "
        "it is no second moment of keys, or comes from far too few tokens (corpus.tokens)"
    )


def regularised_keys(solver: KeySolver, keys_KB: Tensor, *, weight: float) -> Tensor:
    """Return (weight * C + keys keys^T)^-1 keys (K, B) in float64 (MEMIT, arXiv:2210.07229, equation 14).

    By the push-through identity this is C^-1 keys (weight * I + keys^T C^-1 keys)^-1: a system of B unknowns.

    Raises:
        DependentKeysError: the weight is 0 and the keys are linearly dependent.
    """
    solved_KB = solver.solve(keys_KB)
    small_BB = keys_KB.to(solved_KB.device, torch.float64).T @ solved_KB
    small_BB = small_BB + weight * torch.eye(len(small_BB), dtype=torch.float64, device=small_BB.device)
    update_BK, info = torch.linalg.solve_ex(small_BB, solved_KB.T)
    if int(info) != 0:
        raise DependentKeysError(f"{keys_KB.shape[1]} keys are linearly dependent")
    return Tensor(update_BK.T)
