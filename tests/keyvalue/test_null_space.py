"""The projection and the memory of edited keys against dense linear algebra, at any number of earlier keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from editeval.datasets.corpus import StandardLibraryCorpus
from editeval.files import Cache
from editeval.keyvalue import null_space as module
from editeval.keyvalue.covariance import CovarianceSource
from editeval.keyvalue.null_space import KeyMemory, null_space, null_spaces
from editeval.models.tiny import TinyModel
from editeval.types import SilentProgress

WIDTH = 24
RIDGE = 0.7


@pytest.fixture
def covariance() -> Tensor:
    keys = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, WIDTH)
    return keys.T @ keys / len(keys)


def keys(count: int, seed: int) -> Tensor:
    return torch.randn(WIDTH, count, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("threshold", [0.01, 0.5, 8.0], ids=["few-kept", "some-kept", "most-kept"])
def test_projection_equals_the_one_from_singular_vectors(covariance: Tensor, threshold: float) -> None:
    left, values, _ = torch.linalg.svd(covariance.double())
    expected = left[:, values < threshold] @ left[:, values < threshold].T
    space = null_space(covariance, threshold=threshold, share=0.5)
    assert space.kept == int((values < threshold).sum()) > 0
    assert space.basis.shape[1] <= WIDTH // 2
    assert torch.allclose(space.project(torch.eye(WIDTH)), expected, atol=1e-10)


def test_without_a_threshold_the_directions_of_least_use_are_kept_whatever_the_unit(covariance: Tensor) -> None:
    space, scaled = (null_space(matrix, threshold=None, share=0.25) for matrix in (covariance, 1000 * covariance))
    values = torch.linalg.eigvalsh(covariance.double())
    below = null_space(covariance, threshold=float(values[5] + values[6]) / 2, share=0.9)
    assert space.kept == scaled.kept == below.kept == WIDTH // 4
    key = keys(1, seed=0)
    assert torch.allclose(space.project(key), below.project(key), atol=1e-8)
    assert torch.allclose(space.project(key), scaled.project(key), atol=1e-8)


@pytest.mark.parametrize("fold", [4, 512], ids=["folded", "held"])
@pytest.mark.parametrize("batch", [1, 3])
def test_solve_equals_the_dense_system_with_all_earlier_keys(monkeypatch: pytest.MonkeyPatch, fold: int, batch: int) -> None:
    monkeypatch.setattr(module, "FOLD_KEYS", fold)
    memory = KeyMemory(ridge=RIDGE)
    system = RIDGE * torch.eye(WIDTH, dtype=torch.float64)
    for step in range(40 // batch):
        new = keys(batch, seed=step)
        expected = torch.linalg.solve(system + new @ new.T, new)
        assert torch.allclose(memory.solve(new), expected, rtol=1e-9, atol=1e-12)
        memory.absorb(new)
        system = system + new @ new.T


@pytest.mark.parametrize("fold", [4, 512], ids=["folded", "held"])
def test_absorbing_the_same_keys_again_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, fold: int) -> None:
    monkeypatch.setattr(module, "FOLD_KEYS", fold)
    first, second = KeyMemory(ridge=RIDGE), KeyMemory(ridge=RIDGE)
    for step in range(11):
        first.solve(keys(2, seed=100 + step))
        first.absorb(keys(2, seed=step))
    for step in range(11):
        second.absorb(keys(2, seed=step))
    assert torch.equal(first.solve(keys(2, seed=99)), second.solve(keys(2, seed=99)))


def test_a_batch_larger_than_the_fold_is_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLD_KEYS", 4)
    memory = KeyMemory(ridge=RIDGE)
    memory.absorb(keys(2, seed=0))
    memory.absorb(keys(9, seed=1))
    earlier = torch.cat([keys(2, seed=0), keys(9, seed=1)], dim=1)
    system = RIDGE * torch.eye(WIDTH, dtype=torch.float64) + earlier @ earlier.T
    new = keys(1, seed=2)
    assert torch.allclose(memory.solve(new), torch.linalg.solve(system + new @ new.T, new), rtol=1e-9)


def test_projections_are_made_once_and_another_threshold_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TinyModel(name="tiny", architecture="gpt2", cache_dir=tmp_path).load()
    source = CovarianceSource(corpus=StandardLibraryCorpus(tokens=1000, max_length=64))
    site = lm.sites.mlp_out.format(1)

    def spaces(threshold: float | None) -> module.NullSpace:
        return null_spaces(lm, [site], source, Cache(tmp_path), SilentProgress(), threshold=threshold, share=0.3)[site]

    first = spaces(None)
    assert first.kept == int(0.3 * lm.description.intermediate_size)
    assert spaces(1e9).kept == lm.description.intermediate_size
    monkeypatch.setattr(module, "key_covariances", None)
    again = spaces(None)
    assert torch.equal(first.basis, again.basis)
    assert (first.keeps, first.kept) == (again.keeps, again.kept)
