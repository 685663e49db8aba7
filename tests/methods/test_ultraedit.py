"""UltraEdit's closed form, its lifelong statistics, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editeval.edits.delta import DenseDelta, Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.features import editing_features
from editeval.keyvalue.fine_tuning import target_row
from editeval.methods.ultraedit import Editor, Statistics, UltraEdit
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, SilentProgress

METHOD = UltraEdit(name="ultraedit", maps={"mlp_out": [1, 2]}, learning_rate=1e-4, rows_per_pass=10)
REQUESTS = (
    EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Norway"),
    EditRequest(request_id="c", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa"),
)


@pytest.fixture(scope="module")
def tiny(cache_dir: Path) -> Callable[[str], LanguageModel]:
    return lambda architecture: TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()


def editor(lm: LanguageModel, tmp_path: Path, method: UltraEdit = METHOD) -> Editor:
    return method.prepare(EditedModel(lm), Cache(tmp_path), SilentProgress())


def dense(edit: Edit) -> list[Tensor]:
    return [delta.value if isinstance(delta, DenseDelta) else delta.left @ delta.right for delta in edit.deltas]


def test_statistics_in_parts_equal_those_of_all_together() -> None:
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    statistics = Statistics(count=0.0, mean=torch.zeros(6).double(), squares=torch.zeros(6).double())
    for part in vectors.split([1, 9, 40]):
        statistics = statistics.with_more(part)
    assert statistics.count == 50
    assert torch.allclose(statistics.mean, vectors.mean(dim=0))
    normalised = statistics.normalised(vectors)
    assert torch.allclose(normalised, (vectors - vectors.mean(0)) / vectors.std(0))


def test_what_never_deviated_is_normalised_to_nothing() -> None:
    statistics = Statistics(count=0.0, mean=torch.zeros(2).double(), squares=torch.zeros(2).double()).with_more(torch.tensor([[1.0, 2.0]]))
    assert statistics.normalised(torch.tensor([[1.0, 2.0]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_features_multiply_to_the_gradient_of_the_weight(tiny: Callable[[str], LanguageModel], architecture: str) -> None:
    lm = tiny(architecture)
    row = target_row(lm.tokenizer, REQUESTS[0], scored_at="target", max_tokens=100)
    site = lm.sites.mlp_out.format(2)
    features = editing_features(lm, [row], [site, lm.sites.mlp_in[0].format(1)]).of_map[site]
    weight = lm.module.get_submodule(site).get_parameter("weight").requires_grad_()
    logits = lm.module(torch.tensor([row.input_ids])).logits[0, list(row.positions)]
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens)), [weight])
    weight.requires_grad_(False)
    ours = features.gradients.T @ features.inputs
    assert torch.allclose(ours.T if lm.sites.transposed else ours, expected, atol=1e-6)


def test_the_update_solves_the_published_normal_equations(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    lm = tiny("llama")
    rows = [target_row(lm.tokenizer, request, scored_at="target", max_tokens=100) for request in REQUESTS]
    sites = [lm.sites.mlp_out.format(layer) for layer in (1, 2)]
    features = editing_features(lm, rows, sites).of_map
    z = {site: torch.cat([features[site].inputs, features[site].gradients], dim=1).double() for site in sites}
    both = torch.cat(list(z.values()))  # maps of one shape share their statistics; each adds its own before it is normalised
    statistics = Statistics(count=0.0, mean=torch.zeros(both.shape[1]).double(), squares=torch.zeros(both.shape[1]).double()).with_more(
        both
    )
    for site, ours in zip(sites, dense(editor(lm, tmp_path).edit(REQUESTS, seed=0)), strict=True):
        keys = features[site].inputs.double()
        hidden, gradients = statistics.normalised(z[site]).tensor_split([keys.shape[1]], dim=1)
        values = -1e-4 * hidden.square().sum(1, keepdim=True) * gradients
        solved = torch.linalg.solve(keys.T @ keys + torch.eye(keys.shape[1], dtype=torch.float64), keys.T @ values)
        assert float((ours.double() - solved.T).norm() / solved.norm()) < 1e-5


def test_how_many_facts_run_together_does_not_change_an_edit(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    lm = tiny("gpt2")
    together, alone = (dense(editor(lm, tmp_path, replace(METHOD, rows_per_pass=size)).edit(REQUESTS, seed=0)) for size in (3, 1))
    assert all(float((left - right).norm() / left.norm()) < 1e-4 for left, right in zip(together, alone, strict=True))
    assert METHOD.settings() == replace(METHOD, rows_per_pass=1).settings()


def test_statistics_go_on_from_the_last_edit_in_the_model_and_start_anew_after_a_restore(
    tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = EditedModel(tiny("gpt2"))
    ultra = METHOD.prepare(model, Cache(tmp_path), SilentProgress())
    first = ultra.edit(REQUESTS[:1], seed=0)
    model.apply(first)
    second = ultra.edit(REQUESTS[1:2], seed=0)
    (name,) = [name for name in first.auxiliary if name.endswith(".count")]
    tokens = [len(target_row(model.lm.tokenizer, request, scored_at="target", max_tokens=100).input_ids) for request in REQUESTS[:2]]
    assert (float(first.auxiliary[name]), float(second.auxiliary[name])) == (2 * tokens[0], 2 * sum(tokens))  # two maps of one shape
    model.restore()
    again = ultra.edit(REQUESTS[:1], seed=0)
    assert all(torch.equal(first.auxiliary[name], again.auxiliary[name]) for name in first.auxiliary)


def test_an_edit_is_stored_factored_unless_dense_is_smaller(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    lm = tiny("llama")
    few = editor(lm, tmp_path).edit(REQUESTS[:1], seed=0)
    assert all(isinstance(delta, LowRankDelta) for delta in few.deltas)
    many = [replace(REQUESTS[index % 3], request_id=str(index), subject=f"{REQUESTS[index % 3].subject} {index}") for index in range(30)]
    assert all(isinstance(delta, DenseDelta) for delta in editor(lm, tmp_path).edit(many, seed=0).deltas)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"attention": [1]}, "must name some of"),
        ({}, "must name some of"),
        ({"mlp_out": [9]}, "layer 9"),
        ({"mlp_out": []}, "names no layer"),
    ],
)
def test_maps_that_are_not_there_are_refused(tiny: Callable[[str], LanguageModel], maps: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(METHOD, maps=maps).check(tiny("gpt2").description)


def test_a_gate_is_refused_where_there_is_none(tiny: Callable[[str], LanguageModel]) -> None:
    replace(METHOD, maps={"mlp_gate": [1], "mlp_up": [1]}).check(tiny("llama").description)
    with pytest.raises(ConfigError, match="no map mlp_gate"):
        replace(METHOD, maps={"mlp_gate": [1]}).check(tiny("gpt2").description)
