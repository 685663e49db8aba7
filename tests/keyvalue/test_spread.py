"""The spread equals the plain one that writes weights and solves densely, on every architecture, one by one and in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.straightforward_spread import FullSpread, full_spread, memit_solve
from editeval.edits.delta import Edit
from editeval.inference.edited import EditedModel
from editeval.keyvalue.objective import FactRows, TargetSettings
from editeval.keyvalue.solve import CholeskyFactor, factorise, regularised_keys
from editeval.keyvalue.spread import Spread, Target, check_batch, spread, update_norm
from editeval.keyvalue.target_value import fact_rows, optimise
from editeval.keyvalue.walk import LayerWalk
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.types import EditError, EditRequest

LAYERS = (0, 1, 2)
WEIGHT = 20.0
SETTINGS = TargetSettings(num_steps=6, learning_rate=0.3, weight_decay=0.5, clamp_norm_factor=2.0, kl_factor=0.0625, early_stop_loss=0.05)
CONTEXTS = ("{}", "Yesterday it rained in the north. {}", "Therefore. {}")
REQUESTS = (
    EditRequest(request_id="a", prompt="The mother tongue of {}, born in the south, is", subject="Danielle Darrieux", target_new="English"),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Papua New Guinea"),
    EditRequest(request_id="c", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa"),
)

Make = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def make(cache_dir: Path) -> Make:
    made: dict[str, LanguageModel] = {}

    def model(architecture: str) -> LanguageModel:
        if architecture not in made:
            made[architecture] = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()
        return made[architecture]

    return model


def rows_of(lm: LanguageModel, *requests: EditRequest) -> list[FactRows]:
    return [fact_rows(lm.tokenizer, request, CONTEXTS) for request in requests]


def covariance(lm: LanguageModel, site: str) -> Tensor:
    """A well-conditioned second moment as wide as the keys of a site."""
    weight = lm.module.get_submodule(site).get_parameter("weight")
    width = weight.shape[0] if lm.sites.transposed else weight.shape[1]
    keys = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(len(site)))
    return keys.T @ keys / len(keys)


class Method:
    """MEMIT's or PMET's way to spread, fast and plain."""

    def __init__(self, lm: LanguageModel, *, attention: bool, layers: tuple[int, ...] = LAYERS) -> None:
        sites = lm.sites
        self.lm, self.layers = lm, layers
        pairs = ((sites.attention_out, sites.attention_out), (sites.mlp_out, sites.mlp_out))
        self.pairs = pairs if attention else ((sites.mlp_out, sites.layers),)
        self.optimised = (sites.mlp_out, sites.attention_out) if attention else (sites.layers,)
        self.share: Callable[[int], float] = (lambda left: left**-0.5) if attention else (lambda left: 1 / left)
        self.covariances = {path.format(layer): covariance(lm, path.format(layer)) for path, _ in self.pairs for layer in layers}
        self.factors = {site: factorise(matrix) for site, matrix in self.covariances.items()}

    def ours(self, facts: list[FactRows]) -> Spread:
        last = self.layers[-1]
        values = optimise(self.lm, facts, layer=last, sites=[path.format(last) for path in self.optimised], settings=SETTINGS)

        def solve(site: str, keys: Tensor) -> Tensor:
            return regularised_keys(self.factors[site], keys, weight=WEIGHT)

        targets = [Target(edited=edited, moved=moved) for edited, moved in self.pairs]
        return spread(self.lm, facts, values, layers=self.layers, targets=targets, share=self.share, solve=solve)

    def plain(self, facts: list[FactRows]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        how = FullSpread(
            layers=self.layers,
            optimised=self.optimised,
            targets=self.pairs,
            share=self.share,
            solve=memit_solve(self.covariances, weight=WEIGHT),
        )
        return full_spread(self.lm, facts, how, settings=SETTINGS)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("attention", [False, True], ids=["residual-stream", "mlp-and-attention"])
@pytest.mark.parametrize("architecture", SITES)
def test_updates_and_keys_equal_passes_over_the_rewritten_model(make: Make, architecture: str, attention: bool) -> None:
    lm = make(architecture)
    method = Method(lm, attention=attention)
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    facts = rows_of(lm, *REQUESTS[:2])
    ours = method.ours(facts)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.module.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.module.modules())
    updates, keys = method.plain(facts)
    assert {update.parameter.removesuffix(".weight") for update in ours.updates} == updates.keys()
    for update in ours.updates:
        site = update.parameter.removesuffix(".weight")
        assert relative_error(ours.keys[site].T, keys[site]) < 1e-4
        assert relative_error(update.left.double() @ update.right.double(), updates[site]) < 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "olmo2"])
def test_layers_between_edited_ones_are_walked_through(make: Make, architecture: str) -> None:
    lm = make(architecture)
    method = Method(lm, attention=False, layers=(0, 2))
    facts = rows_of(lm, *REQUESTS)
    updates, _ = method.plain(facts)
    for update in method.ours(facts).updates:
        assert relative_error(update.left.double() @ update.right.double(), updates[update.parameter.removesuffix(".weight")]) < 1e-3


def test_keys_of_a_higher_layer_feel_the_updates_below_it(make: Make) -> None:
    lm = make("llama")
    method = Method(lm, attention=False)
    facts = rows_of(lm, REQUESTS[0])
    ours = method.ours(facts)
    walk = LayerWalk(lm, facts, first=LAYERS[0], last=LAYERS[-1])
    ended: list[int] = []
    layers = [lm.layer_module(lm.sites.layers, layer) for layer in range(lm.description.num_layers)]
    handles = [module.register_forward_hook(lambda *_, layer=layer: ended.append(layer)) for layer, module in enumerate(layers)]
    for layer in LAYERS:
        site = lm.sites.mlp_out.format(layer)
        before = walk.keys(site)
        assert set(ended) == set(range(layer))  # the pass stopped at the site: neither this layer came to its end nor one above it
        assert (relative_error(ours.keys[site], before) > 1e-3) == (layer > 0)
        if layer != LAYERS[-1]:
            walk.advance()
    for handle in handles:
        handle.remove()


def test_keys_are_the_published_mean_over_groups_of_prefixes(make: Make) -> None:
    """MEMIT's compute_ks: the mean within each group, then over the groups, of which the bare prompt is one."""
    lm = make("gpt2")
    site = lm.sites.mlp_out.format(1)
    facts = [fact_rows(lm.tokenizer, request, (*CONTEXTS, "Soon. {}")) for request in REQUESTS]

    def keys_of(number: int) -> Tensor:
        alone = [replace(fact, prompts=fact.prompts[number : number + 1]) for fact in facts]
        return LayerWalk(lm, alone, first=1, last=1).keys(site)

    bare, first, second, third = map(keys_of, range(4))
    for sizes, expected in (((2, 1), (bare + (first + second) / 2 + third) / 3), ((), (bare + (first + second + third) / 3) / 2)):
        assert relative_error(LayerWalk(lm, facts, first=1, last=1, group_sizes=sizes).keys(site), expected) < 1e-6


def test_a_spread_edit_written_into_the_weights_moves_the_values_as_the_walk_said(make: Make) -> None:
    lm = make("qwen2")
    method = Method(lm, attention=False)
    facts = rows_of(lm, REQUESTS[1])
    ours = method.ours(facts)
    walk = LayerWalk(lm, facts, first=LAYERS[-1], last=LAYERS[-1])
    unedited = walk.values(lm.sites.layers.format(LAYERS[-1]))
    model = EditedModel(lm)
    model.apply(Edit(deltas=ours.updates))
    edited = LayerWalk(lm, facts, first=LAYERS[-1], last=LAYERS[-1]).values(lm.sites.layers.format(LAYERS[-1]))
    model.restore()
    walk = LayerWalk(lm, facts, first=LAYERS[0], last=LAYERS[-1])
    for layer in LAYERS:
        walk.add(next(update for update in ours.updates if f".{layer}." in update.parameter))
        if layer != LAYERS[-1]:
            walk.advance()
    assert relative_error(walk.values(lm.sites.layers.format(LAYERS[-1])), edited) < 1e-5
    assert relative_error(edited, unedited) > 1e-2


def test_many_facts_in_small_passes_equal_one_pass(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("gpt_neox")
    method = Method(lm, attention=False)
    facts = rows_of(lm, *REQUESTS)
    together = method.ours(facts)
    monkeypatch.setattr("editeval.keyvalue.target_value.FACTS_PER_PASS", 1)
    monkeypatch.setattr("editeval.keyvalue.walk.ROW_TOKENS", 1)
    apart = method.ours(facts)
    for left, right in zip(together.updates, apart.updates, strict=True):
        assert relative_error(left.left @ left.right, right.left @ right.right) < 1e-3


def test_contradicting_facts_of_one_edit_are_named() -> None:
    other = replace(REQUESTS[0], request_id="other", target_new="Greek")
    with pytest.raises(EditError, match=r"English.*Greek.*request a, other") as caught:
        check_batch([REQUESTS[0], REQUESTS[1], other])
    assert caught.value.request_ids == ("a", "other")
    with pytest.raises(EditError, match="no facts"):
        check_batch([])


def test_equal_keys_without_a_ridge_are_named(make: Make) -> None:
    lm = make("gpt2")
    facts = rows_of(lm, REQUESTS[0], replace(REQUESTS[0], request_id="twin", prompt="The mother tongue of {}, then, is"))
    values = optimise(lm, facts, layer=1, sites=[lm.sites.layers.format(1)], settings=SETTINGS)
    unit = CholeskyFactor(lower=torch.eye(lm.description.intermediate_size, dtype=torch.float64), ridge=0.0)

    def solve(site: str, keys: Tensor) -> Tensor:
        return regularised_keys(unit, keys[:, :1].expand(-1, 2), weight=0.0)

    targets = [Target(edited=lm.sites.mlp_out, moved=lm.sites.layers)]
    with pytest.raises(EditError, match=r"cannot be told apart.*request a, twin"):
        spread(lm, facts, values, layers=(1,), targets=targets, share=lambda left: 1 / left, solve=solve)


def test_update_norm_is_the_norm_of_the_product(make: Make) -> None:
    lm = make("gpt2")
    for update in Method(lm, attention=False).ours(rows_of(lm, *REQUESTS)).updates:
        assert update_norm(update) == pytest.approx(float((update.left @ update.right).norm()), rel=1e-5)
