"""Key covariances: the plain sum over tokens, whatever batches, kills and files do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from editeval.files import Cache
from editeval.keyvalue import covariance as module
from editeval.keyvalue.covariance import CovarianceSource, covariance_factors, key_covariances, pack_upper, token_pieces, unpack_upper
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, SilentProgress

TEXTS = tuple(
    f"In the year {1900 + number} the river rose again, and {number} boats went down to the sea. " * (1 + number % 4)
    for number in range(40)
)


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """A corpus for tests that counts how often it was read."""

    tokens: int = 1500
    max_length: int = 24
    texts_: tuple[str, ...] = TEXTS
    reads: list[int] = field(default_factory=list)

    def check(self) -> None: ...

    def content_hash(self) -> str:
        return "sentences"

    def texts(self) -> Iterator[str]:
        self.reads.append(1)
        yield from self.texts_


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir).load()


def sites_of(lm: LanguageModel, *layers: int) -> list[str]:
    return [lm.sites.mlp_out.format(layer) for layer in layers]


def plain_covariance(lm: LanguageModel, site: str, corpus: Sentences) -> Tensor:
    """One piece at a time through the whole model, float64 sums."""
    keys: list[Tensor] = []
    handle = lm.module.get_submodule(site).register_forward_pre_hook(lambda _, arguments: keys.append(arguments[0][0].double()))
    with torch.no_grad():
        for piece in token_pieces(lm.tokenizer, corpus.texts_, tokens=corpus.tokens, max_length=corpus.max_length):
            lm.module(input_ids=torch.tensor([piece]))
    handle.remove()
    keys_NK = torch.cat(keys)
    assert len(keys_NK) == corpus.tokens
    return keys_NK.T @ keys_NK / len(keys_NK)


def test_covariances_of_several_layers_equal_the_plain_sum(lm: LanguageModel, tmp_path: Path) -> None:
    corpus = Sentences()
    sites = sites_of(lm, 0, 2)
    computed = key_covariances(lm, sites, CovarianceSource(corpus=corpus), Cache(tmp_path), SilentProgress())
    for site in sites:
        expected = plain_covariance(lm, site, corpus)
        assert float((computed[site] - expected).norm() / expected.norm()) < 1e-6
    assert len(corpus.reads) == 1


def test_the_pass_stops_after_the_last_wanted_layer(lm: LanguageModel, tmp_path: Path) -> None:
    calls: list[int] = []
    handle = lm.layer_module(lm.sites.layers, 1).register_forward_hook(lambda *_: calls.append(1))
    key_covariances(lm, sites_of(lm, 0), CovarianceSource(corpus=Sentences()), Cache(tmp_path), SilentProgress())
    handle.remove()
    assert not calls


def test_a_killed_pass_continues_and_ends_with_the_same_numbers(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 200)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    sites, source = sites_of(lm, 1, 2), CovarianceSource(corpus=Sentences())
    run_chunk = module._chunk_sums
    calls: list[int] = []

    def count_then_die(limit: int) -> Callable[..., dict[str, Tensor]]:
        def counted(*arguments: Any) -> dict[str, Tensor]:
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(1)
            return run_chunk(*arguments)

        return counted

    monkeypatch.setattr(module, "_chunk_sums", count_then_die(1000))
    unbroken = key_covariances(lm, sites, source, Cache(tmp_path / "unbroken"), SilentProgress())
    num_chunks = len(calls)
    assert num_chunks > 5
    calls.clear()
    cache = Cache(tmp_path / "killed")
    monkeypatch.setattr(module, "_chunk_sums", count_then_die(4))
    with pytest.raises(KeyboardInterrupt):
        key_covariances(lm, sites, source, cache, SilentProgress())
    calls.clear()
    monkeypatch.setattr(module, "_chunk_sums", count_then_die(1000))
    resumed = key_covariances(lm, sites, source, cache, SilentProgress())
    assert len(calls) == num_chunks - 4
    assert all(torch.equal(resumed[site], unbroken[site]) for site in sites)
    assert not list(cache.root.rglob("*.partial.*"))


def test_a_second_call_reads_the_cache_alone(lm: LanguageModel, tmp_path: Path) -> None:
    corpus = Sentences()
    sites, source, cache = sites_of(lm, 1), CovarianceSource(corpus=corpus), Cache(tmp_path)
    first = covariance_factors(lm, sites, source, cache, SilentProgress())
    second = covariance_factors(lm, sites, source, cache, SilentProgress())
    assert torch.equal(first[sites[0]].lower, second[sites[0]].lower)
    assert len(corpus.reads) == 1


def test_another_model_site_text_or_length_is_another_entry(lm: LanguageModel) -> None:
    from dataclasses import replace

    corpus = Sentences()
    sources = [CovarianceSource(corpus=other) for other in (corpus, replace(corpus, tokens=1499), replace(corpus, max_length=23))]
    keys = {module._key(lm, site, source) for source in sources for site in sites_of(lm, 0, 1)}
    keys.add(module._key(replace(lm, fingerprint="other"), sites_of(lm, 0)[0], sources[0]))
    assert len(keys) == 7


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("named", ["path", "weight", "number"])
def test_a_file_is_read_full_or_packed_under_any_of_its_names(lm: LanguageModel, tmp_path: Path, packed: bool, named: str) -> None:
    (site,) = sites_of(lm, 1)
    corpus = Sentences()
    computed = key_covariances(lm, [site], CovarianceSource(corpus=corpus), Cache(tmp_path), SilentProgress())[site]
    name = {"path": site, "weight": f"{site}.weight", "number": "1"}[named]
    save_file({name: pack_upper(computed) if packed else computed}, tmp_path / "c.safetensors")
    source = CovarianceSource(corpus=corpus, file=str(tmp_path / "c.safetensors"))
    source.check({site: len(computed)})
    read = key_covariances(lm, [site], source, Cache(tmp_path / "other"), SilentProgress())[site]
    assert torch.equal(read, computed)


def test_packing_a_symmetric_matrix_keeps_the_rows_of_its_upper_triangle() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert pack_upper(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(unpack_upper(pack_upper(matrix)), matrix)
    with pytest.raises(ConfigError, match="upper triangle"):
        unpack_upper(torch.ones(5))


def test_a_file_that_does_not_fit_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    save_file({"model.layers.1.mlp.down_proj": torch.eye(4)}, tmp_path / "c.safetensors")
    source = CovarianceSource(corpus=Sentences(), file=str(tmp_path / "c.safetensors"))
    with pytest.raises(ConfigError, match=r"no covariance named 'model.layers.2.mlp.down_proj'.*holds model.layers.1"):
        source.check({"model.layers.2.mlp.down_proj": 4})
    with pytest.raises(ConfigError, match=r"\(4, 4\); expected \(8, 8\)"):
        source.check({"model.layers.1.mlp.down_proj": 8})
    two_of_a_layer = {"model.layers.1.mlp.down_proj": 4, "model.layers.1.self_attn.o_proj": 4}
    save_file({"1": torch.eye(4)}, tmp_path / "numbered.safetensors")
    numbered = CovarianceSource(corpus=Sentences(), file=str(tmp_path / "numbered.safetensors"))
    numbered.check({"model.layers.1.self_attn.o_proj": 4})
    with pytest.raises(ConfigError, match=r"no covariance named 'model.layers.1.mlp.down_proj' or [^ ]*weight'; it holds 1"):
        numbered.check(two_of_a_layer)
    with pytest.raises(ConfigError, match="no file"):
        CovarianceSource(corpus=Sentences(), file=str(tmp_path / "absent")).check({"x": 4})


def test_too_little_text_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"width 2000.*set corpus.tokens to at least 2000"):
        CovarianceSource(corpus=Sentences()).check(dict.fromkeys(sites_of(lm, 0), 2000))
    short = CovarianceSource(corpus=Sentences(tokens=100_000))
    with pytest.raises(ConfigError, match=r"holds \d+ tokens, corpus.tokens asks for 100000"):
        key_covariances(lm, sites_of(lm, 0), short, Cache(tmp_path), SilentProgress())
