"""The kept inverse: right, made once, and replaced by a factor where it cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editeval.datasets.corpus import StandardLibraryCorpus
from editeval.files import Cache
from editeval.keyvalue import inverse as module
from editeval.keyvalue.covariance import CovarianceSource, key_covariances
from editeval.keyvalue.inverse import CovarianceInverse, covariance_solvers
from editeval.keyvalue.solve import CholeskyFactor, IllConditionedError
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import SilentProgress

SOURCE = CovarianceSource(corpus=StandardLibraryCorpus(tokens=2000, max_length=64))


@pytest.fixture
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="gpt2", cache_dir=cache_dir).load()


def sites(lm: LanguageModel) -> list[str]:
    return [lm.sites.mlp_out.format(1), lm.sites.attention_out.format(2)]


def test_solvers_invert_the_covariance_of_each_site(lm: LanguageModel, tmp_path: Path) -> None:
    solvers = covariance_solvers(lm, sites(lm), SOURCE, Cache(tmp_path), SilentProgress())
    for site, covariance in key_covariances(lm, sites(lm), SOURCE, Cache(tmp_path), SilentProgress()).items():
        assert isinstance(solvers[site], CovarianceInverse)
        keys = torch.randn(len(covariance), 2, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(covariance.double() @ solvers[site].solve(keys), keys.double(), atol=1e-5)


def test_a_second_run_reads_the_same_bits_and_computes_nothing(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = covariance_solvers(lm, sites(lm), SOURCE, Cache(tmp_path), SilentProgress())
    monkeypatch.setattr(module, "factorise", None)
    again = covariance_solvers(lm, sites(lm), SOURCE, Cache(tmp_path), SilentProgress())
    for site in sites(lm):
        keys = torch.eye(lm.description.intermediate_size if "mlp" in site else lm.description.hidden_size)
        assert torch.equal(first[site].solve(keys), again[site].solve(keys))


def test_an_inverse_with_a_large_residual_gives_way_to_the_factor(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: CholeskyFactor) -> torch.Tensor:
        raise IllConditionedError("residual")

    monkeypatch.setattr(CholeskyFactor, "inverse", refuse)
    solvers = covariance_solvers(lm, sites(lm), SOURCE, Cache(tmp_path), SilentProgress())
    assert all(isinstance(solver, CholeskyFactor) for solver in solvers.values())
