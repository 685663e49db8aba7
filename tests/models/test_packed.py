"""Products from packed copies: the same numbers, of the weights as they are now, with the gradients that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editeval.inference.edited import EditedModel
from editeval.models import packed
from editeval.models.model import LanguageModel
from editeval.models.packed import MOST_BYTES, PackedWeights, allowed_bytes, packed_bytes
from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError

# Not `can_pack`: where torch has oneDNN and it cannot be called any more, these tests must fail.
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")

PROMPTS = ("The mother tongue of Danielle is", "Paris lies in")


def maps() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(96, 40), nn.Linear(40, 24, bias=False), Conv1D(64, 24)]


def through(modules: Sequence[nn.Module], states: torch.Tensor) -> torch.Tensor:
    for module in modules:
        states = module(states)
    return states


def frozen() -> list[nn.Module]:
    return [module.requires_grad_(False) for module in maps()]


def everything() -> PackedWeights:
    return PackedWeights(fewest_elements=1, most_bytes=MOST_BYTES)


@pytest.mark.parametrize("terms", [1024, 40, 7])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (7, 96), (3, 5, 96)], ids=str)
def test_products_and_gradients_are_those_of_the_plain_weights(shape: tuple[int, ...], terms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_TERMS", terms)
    modules, weights = frozen(), everything()
    states = torch.randn(shape, requires_grad=True)
    expected = through(modules, states)
    (wanted,) = torch.autograd.grad(expected.square().sum(), [states])
    with weights.products(modules):
        found = through(modules, states)
        (gradient,) = torch.autograd.grad(found.square().sum(), [states])
        with torch.no_grad():
            again = through(modules, states)
    assert len(weights) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


def test_a_weight_that_was_written_to_or_exchanged_is_packed_again() -> None:
    modules, weights = frozen(), everything()
    states = torch.randn(7, 96)
    first = modules[0]
    assert isinstance(first, nn.Linear)
    with weights.products(modules):
        through(modules, states)
        with torch.no_grad():
            first.weight.mul_(2)
        torch.testing.assert_close(first(states), states @ first.weight.T + first.bias, rtol=1e-5, atol=1e-5)
        old, first.weight.data = first.weight.data, torch.randn(40, 96)
        torch.testing.assert_close(first(states), states @ first.weight.T + first.bias, rtol=1e-5, atol=1e-5)
        first.weight.data = old
        torch.testing.assert_close(first(states), states @ old.T + first.bias, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_the_weight_itself_is_still_right() -> None:
    modules = maps()
    states = torch.randn(7, 96)
    expected = torch.autograd.grad(through(modules, states).square().sum(), [modules[0].weight])
    with everything().products(modules):
        found = torch.autograd.grad(through(modules, states).square().sum(), [modules[0].weight])
    assert torch.equal(found[0], expected[0])


def test_memory_and_size_decide_what_is_packed() -> None:
    modules = frozen()
    states = torch.randn(7, 96)
    room_for_one = PackedWeights(fewest_elements=1, most_bytes=packed_bytes(96 * 40))
    with room_for_one.products(modules):
        through(modules, states)
    assert len(room_for_one) == 1
    with room_for_one.products(modules[1:]):  # copies that nobody can use any more are given back
        assert len(room_for_one) == 0
    large = PackedWeights(fewest_elements=40 * 24 + 1, most_bytes=MOST_BYTES)
    with large.products(modules):
        through(modules, states)
    assert len(large) == 2  # 96 x 40 and 64 x 24


def test_weights_of_which_nobody_can_say_whether_they_were_written_to_stay_as_they_are() -> None:
    weights = everything()
    with torch.inference_mode():
        module = nn.Linear(96, 40).requires_grad_(False)
        with weights.products([module]):
            module(torch.randn(7, 96))
    assert len(weights) == 0


def test_half_precision_stays_as_it_is() -> None:
    weights = everything()
    module = nn.Linear(96, 40).to(torch.bfloat16).requires_grad_(False)
    with weights.products([module]):
        module(torch.randn(7, 96, dtype=torch.bfloat16))
    assert len(weights) == 0


@pytest.mark.parametrize("architecture", SITES)
def test_a_model_answers_as_without_copies(cache_dir: Path, architecture: str) -> None:
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()
    every_map = replace(lm, packed=everything())
    asked = (PROMPTS, (" French", " France"))
    expected = [score.token_log_probs for score in EditedModel(lm).score(*asked)]
    found = [score.token_log_probs for score in EditedModel(every_map).score(*asked)]
    assert len(every_map.packed) > lm.description.num_layers
    assert len(lm.packed) < len(every_map.packed)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_every_map_of_every_layer_is_found(cache_dir: Path) -> None:
    """A layer that multiplied in another way than `linear` and `addmm` would be slower, and nobody would know."""
    for architecture in SITES:
        lm = replace(TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load(), packed=everything())
        EditedModel(lm).score(PROMPTS, (" French", " France"))
        matrices = {id(part.weight) for part in linear_maps(lm)}
        assert len(lm.packed) == len(matrices)


def linear_maps(lm: LanguageModel) -> list[nn.Module]:
    return [module for module in lm.module.modules() if isinstance(module, nn.Linear | Conv1D)]


def test_without_onednn_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, weights = frozen(), everything()
    states = torch.randn(7, 96)
    monkeypatch.setattr(packed, "can_pack", packed.can_pack.__wrapped__)
    monkeypatch.setattr(packed.torch.ops, "mkldnn", object())
    with weights.products(modules):
        assert torch.equal(through(modules, states), through(frozen(), states))
    assert len(weights) == 0


@pytest.mark.parametrize(
    ("capability", "cpu", "expected"),
    [
        ("AVX512", "processor : 0\nvendor_id : AuthenticAMD\n", MOST_BYTES),
        ("AVX512_BF16", "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel : 17\n", MOST_BYTES),
        ("AVX512", "processor : 0\nvendor_id : GenuineIntel\n", 0),
        ("AVX512", "processor : 0\n", 0),
        ("AVX512", None, 0),
        ("AVX2", "vendor_id : AuthenticAMD\n", 0),
        ("DEFAULT", "vendor_id : AuthenticAMD\n", 0),
    ],
)
def test_nothing_is_packed_by_default_where_it_does_not_pay(
    capability: str, cpu: str | None, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(packed, "CPU_INFO", tmp_path / "cpuinfo")
    if cpu is not None:
        (tmp_path / "cpuinfo").write_text(cpu)
    assert allowed_bytes(None) == expected
    weights = PackedWeights(fewest_elements=1)
    modules = frozen()
    with weights.products(modules):
        through(modules, torch.randn(7, 96))
    assert bool(len(weights)) == bool(expected)


def test_the_setting_is_checked() -> None:
    assert allowed_bytes(0) == 0
    assert allowed_bytes(1.5) == 3 * 2**29
    for wrong in (-1, "much", True, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"engine.packed_gib"):
            allowed_bytes(wrong)
