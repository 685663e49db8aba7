"""Adam (Kingma and Ba 2015, algorithm 1), with the constants of every published configuration."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8

Moments = tuple[Tensor, Tensor]
"""Running means of the gradient and of its square, both of the parameter's shape."""


def new_moments(parameter: Tensor) -> Moments:
    """Return the moments before the first step."""
    return torch.zeros_like(parameter), torch.zeros_like(parameter)


def adam(parameter: Tensor, gradient: Tensor, moments: Moments, *, step: int, learning_rate: float) -> Tensor:
    """Return the parameter after step `step` (1-based); changes the moments."""
    first, second = moments
    beta1, beta2 = BETAS
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (second / (1 - beta2**step)).sqrt_().add_(EPSILON)
    return parameter - learning_rate / (1 - beta1**step) * first / scale
