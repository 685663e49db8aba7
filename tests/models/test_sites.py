"""The table of sites names what the real model classes have, and says so when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from editeval.models.sites import SITES, sites_for
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError


@pytest.fixture(scope="module")
def llama(cache_dir: Path) -> nn.Module:
    return TinyModel(name="tiny-llama", architecture="llama", cache_dir=cache_dir, num_layers=2).load().module


def test_every_architecture_of_the_project_has_sites() -> None:
    assert set(SITES) == {"gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3"}
    assert all(name == sites.model_type for name, sites in SITES.items())


@pytest.mark.parametrize("architecture", SITES)
def test_sites_exist_and_the_maps_out_of_mlp_and_attention_have_the_described_shapes(architecture: str, cache_dir: Path) -> None:
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()
    lm.sites.check(lm.module)
    assert lm.sites.num_layers(lm.module) == lm.description.num_layers
    weight = lm.layer_module(lm.sites.mlp_out, 0).get_parameter("weight")
    d_out_d_in = weight.T.shape if lm.sites.transposed else weight.shape
    assert d_out_d_in == (lm.description.hidden_size, lm.description.intermediate_size)
    attention = lm.layer_module(lm.sites.attention_out, 0).get_parameter("weight")
    d_out_d_in = attention.T.shape if lm.sites.transposed else attention.shape
    assert d_out_d_in == (lm.description.hidden_size, lm.description.attention_width)


@pytest.mark.parametrize("architecture", SITES)
def test_mlp_out_is_the_last_map_of_the_mlp(architecture: str, cache_dir: Path) -> None:
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir, device="cpu").load()
    mlp = lm.layer_module(lm.sites.mlp, 1)
    hidden_states = torch.randn(1, 3, lm.description.hidden_size, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    handle = lm.layer_module(lm.sites.mlp_out, 1).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    returned = mlp(hidden_states)
    handle.remove()
    assert torch.equal(returned, seen[0])


@pytest.mark.parametrize("architecture", SITES)
def test_gated_says_whether_the_first_map_is_a_gate(architecture: str, cache_dir: Path) -> None:
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()
    widths = []
    for path in lm.sites.mlp_in:
        weight = lm.layer_module(path, 0).get_parameter("weight")
        widths.append(weight.shape[1 if lm.sites.transposed else 0])
    assert sum(widths) == (2 if lm.sites.gated else 1) * lm.description.intermediate_size


def test_unknown_architecture_says_what_is_known_and_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r"'t5' is unknown; known: gpt2, .*phi3.*`Sites` record.*editeval/models/sites\.py"):
        sites_for("t5")


def test_a_path_that_only_the_last_layer_lacks_is_found(llama: nn.Module) -> None:
    wrong = replace(sites_for("llama"), mlp_in=("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.middle_proj"))
    with pytest.raises(ConfigError, match=r"no module at 'model\.layers\.\d\.mlp\.middle_proj'.*editeval/models/sites\.py"):
        wrong.check(llama)


def test_the_wrong_orientation_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\.mlp\.gate_proj' is a Linear, expected Conv1D \(transposed=True\)"):
        replace(sites_for("llama"), transposed=True).check(llama)


def test_layers_that_are_no_list_are_refused(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="is no list of layers, got LlamaRMSNorm"):
        replace(sites_for("llama"), layers="model.norm.{}").check(llama)
