"""Solves against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editeval.keyvalue.solve import factorise, regularised_keys
from editeval.types import EditevalError


@pytest.fixture
def covariance() -> Tensor:
    keys_NK = torch.randn(400, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, 24)
    return keys_NK.T @ keys_NK / len(keys_NK)


@pytest.fixture
def keys_kb() -> Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(1))


def test_a_solve_and_the_inverse_equal_dense_algebra(covariance: Tensor, keys_kb: Tensor) -> None:
    factor = factorise(covariance)
    expected = torch.linalg.solve(covariance.double(), keys_kb.double())
    assert factor.ridge == 0.0
    assert torch.allclose(factor.solve(keys_kb), expected, rtol=1e-8)
    assert torch.allclose(factor.inverse() @ keys_kb.double(), expected, rtol=1e-8)


def test_regularised_keys_equal_a_dense_solve(covariance: Tensor, keys_kb: Tensor) -> None:
    keys = keys_kb.double()
    expected = torch.linalg.solve(50 * covariance.double() + keys @ keys.T, keys)
    assert torch.allclose(regularised_keys(factorise(covariance), keys_kb, weight=50.0), expected, rtol=1e-8)


def test_a_singular_covariance_gets_the_smallest_ridge_that_works_and_says_so(keys_kb: Tensor) -> None:
    singular = keys_kb @ keys_kb.T
    factor = factorise(singular)
    assert 0 < factor.ridge <= 1e-5 * float(singular.diagonal().mean())
    rebuilt = factor.lower @ factor.lower.T - factor.ridge * torch.eye(24, dtype=torch.float64)
    assert torch.allclose(rebuilt, singular.double(), atol=1e-10)


@pytest.mark.parametrize(
    ("matrix", "what"),
    [
        (torch.zeros(3, 3), "finite"),
        (torch.full((3, 3), float("nan")), "finite"),
        (torch.tensor([[1.0, 9.0], [9.0, 1.0]]), "positive definite"),
    ],
)
def test_what_is_no_second_moment_is_refused(matrix: Tensor, what: str) -> None:
    with pytest.raises(EditevalError, match=what):
        factorise(matrix)
