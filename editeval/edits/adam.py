"""Adam (Kingma and Ba 2015, algorithm 1), with the constants of every published configuration.

Each operation is one multiplication, addition, division or root of its own, which IEEE 754 rounds alike on every machine: an edit that is
recorded as its gradients (`TunedDelta`) is the same change wherever it is made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8

Moments = tuple[Tensor, Tensor]
"""Running means of the gradient and of its square, both of the parameter's shape."""


def new_moments(parameter: Tensor) -> Moments:
    """Return the moments before the first step."""
    return torch.zeros_like(parameter), torch.zeros_like(parameter)


def corrections(*, step: int, learning_rate: float) -> tuple[float, float]:
    """Return what step `step` (1-based) multiplies the running means with: the gradient's and its square's."""
    beta1, beta2 = BETAS
    return learning_rate / (1 - beta1**step), 1 / (1 - beta2**step)


def adam(parameter: Tensor, gradient: Tensor, moments: Moments, *, step: int, learning_rate: float) -> Tensor:
    """Return the parameter after step `step` (1-based); changes the moments."""
    return corrected_adam(parameter, gradient, moments, corrections(step=step, learning_rate=learning_rate))


def corrected_adam(parameter: Tensor, gradient: Tensor, moments: Moments, factors: Sequence[float | Tensor]) -> Tensor:
    """Return the parameter after a step with these `corrections`, which may be tensors (0-dimensional, float32); changes the moments."""
    first, second = moments
    beta1, beta2 = BETAS
    first_factor, second_factor = factors
    # No `lerp_`, `addcmul_` or `alpha=`, which may round once where these round twice; no division by a number, which may be a product.
    first.mul_(beta1).add_(gradient * (1 - beta1))
    second.mul_(beta2).add_((gradient * gradient).mul_(1 - beta2))
    # MKL's root of a float32 is off by a bit now and then; that of a float64, rounded, is the nearest float32.
    scale = (second * second_factor).double().sqrt_().float().add_(EPSILON)
    return parameter - (first * first_factor).div_(scale)
