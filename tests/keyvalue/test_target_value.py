"""The fast optimisation equals the plain one, on every architecture and for every kind of site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.straightforward import full_target_value
from editeval.keyvalue.objective import FactRows, TargetSettings
from editeval.keyvalue.suffix import SuffixPass, next_token_logits, pad_rows
from editeval.keyvalue.target_value import fact_rows, optimise
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditError, EditRequest

LAYER = 1
SETTINGS = TargetSettings(num_steps=8, learning_rate=0.3, weight_decay=0.5, clamp_norm_factor=4.0, kl_factor=0.0625, early_stop_loss=0.05)
CONTEXTS = ("{}", "Yesterday it rained in the north. {}", "Therefore. {}")
REQUESTS = (
    EditRequest(
        request_id="long",
        prompt="The mother tongue of {}, who was born in the south, is",
        subject="Danielle Darrieux",
        target_new="English",
    ),
    EditRequest(request_id="short", prompt="{} is the capital of", subject="Port Moresby", target_new="Papua New Guinea"),
    EditRequest(request_id="last", prompt="The capital of France is not {}", subject="Berlin", target_new="but Paris"),
)
SITE_KINDS: dict[str, Callable[[LanguageModel], tuple[str, ...]]] = {
    "mlp": lambda lm: (lm.sites.mlp_out.format(LAYER),),
    "layer": lambda lm: (lm.sites.layers.format(LAYER),),
    "mlp-and-attention": lambda lm: (lm.sites.mlp_out.format(LAYER), lm.sites.attention_out.format(LAYER)),
}

Make = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def make(cache_dir: Path) -> Make:
    made: dict[str, LanguageModel] = {}

    def model(architecture: str, **overrides: object) -> LanguageModel:
        key = f"{architecture} {overrides}"
        if key not in made:
            # A window shorter than the prompts; the target must still see the subject through three layers of it.
            window = {"sliding_window": 16} if architecture in ("mistral", "gemma2") else {}
            made[key] = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir, overrides=window | overrides).load()
        return made[key]

    return model


def rows_of(lm: LanguageModel, *requests: EditRequest) -> list[FactRows]:
    return [fact_rows(lm.tokenizer, request, CONTEXTS) for request in requests]


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", SITE_KINDS)
@pytest.mark.parametrize("architecture", SITES)
def test_delta_equals_the_optimisation_over_whole_sequences(make: Make, architecture: str, kind: str) -> None:
    lm = make(architecture)
    sites = SITE_KINDS[kind](lm)
    for fact in rows_of(lm, *REQUESTS[:2]):
        expected = full_target_value(lm, fact, sites=sites, settings=SETTINGS)
        ours = optimise(lm, [fact], layer=LAYER, sites=sites, settings=SETTINGS)[0]
        for site in sites:
            assert float(expected.deltas[site].norm()) > 0.1
            assert relative_error(ours.deltas[site], expected.deltas[site]) < 1e-4
        assert [losses.total for losses in ours.losses] == pytest.approx(expected.losses[:-1], rel=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [0, 3])
def test_delta_is_the_same_for_every_kind_of_mask_at_the_first_and_the_last_layer(make: Make, attention: str, layer: int) -> None:
    lm = make("mistral", attn_implementation=attention)
    assert lm.module.config._attn_implementation == attention
    site = lm.sites.mlp_out.format(layer)
    (fact,) = rows_of(lm, REQUESTS[2])
    expected = full_target_value(lm, fact, sites=[site], settings=SETTINGS)
    ours = optimise(lm, [fact], layer=layer, sites=[site], settings=SETTINGS)[0]
    assert relative_error(ours.deltas[site], expected.deltas[site]) < 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_facts_that_share_a_pass_do_not_touch_each_other(make: Make, architecture: str) -> None:
    lm = make(architecture)
    site = lm.sites.mlp_out.format(LAYER)
    facts = rows_of(lm, *REQUESTS)
    together = optimise(lm, facts, layer=LAYER, sites=[site], settings=SETTINGS)
    for fact, shared in zip(facts, together, strict=True):
        (alone,) = optimise(lm, [fact], layer=LAYER, sites=[site], settings=SETTINGS)
        assert relative_error(shared.deltas[site], alone.deltas[site]) < 1e-4
        assert relative_error(shared.inputs[site], alone.inputs[site]) < 1e-5
        assert len(shared.losses) == len(alone.losses)


def test_a_fact_that_stops_early_keeps_its_delta_while_others_go_on(make: Make) -> None:
    lm = make("llama")
    site = lm.sites.mlp_out.format(LAYER)
    facts = rows_of(lm, *REQUESTS[:2])
    first = [optimise(lm, [fact], layer=LAYER, sites=[site], settings=SETTINGS)[0].losses for fact in facts]
    # A bar that the one fact passes at its third evaluation and the other does not.
    bar = max(losses[2].total for losses in first) if first[0][2].total != first[1][2].total else 0.0
    settings = replace(SETTINGS, early_stop_loss=bar + 1e-3)
    alone = [optimise(lm, [fact], layer=LAYER, sites=[site], settings=settings)[0] for fact in facts]
    together = optimise(lm, facts, layer=LAYER, sites=[site], settings=settings)
    assert len({len(value.losses) for value in alone}) == 2
    for one, shared in zip(alone, together, strict=True):
        assert len(one.losses) == len(shared.losses)
        assert torch.allclose(one.deltas[site], shared.deltas[site], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("architecture", "layer"), [("gpt2", 2), ("llama", 2), ("gpt_neox", 3)])
def test_once_a_fact_is_written_its_target_counts_less_or_its_steps_end(make: Make, architecture: str, layer: int) -> None:
    lm = make(architecture)
    sites = (lm.sites.mlp_out.format(layer), lm.sites.attention_out.format(layer))
    requests = [replace(REQUESTS[2], request_id=target, target_new=target) for target in ("the", "and")]
    plain = TargetSettings(num_steps=20, learning_rate=0.5, weight_decay=0.5, clamp_norm_factor=1.0, kl_factor=0.0625)
    eased = replace(plain, written_nll_factor=0.1)
    ended = replace(eased, written_kl=1.0)
    facts = rows_of(lm, *requests)
    found = {settings: optimise(lm, facts, layer=layer, sites=sites, settings=settings) for settings in (plain, eased, ended)}
    for settings, values in found.items():
        for fact, value in zip(facts, values, strict=True):
            expected = full_target_value(lm, fact, sites=sites, settings=settings)
            assert all(relative_error(value.deltas[site], expected.deltas[site]) < 1e-3 for site in sites)
            assert [losses.total for losses in value.losses] == pytest.approx(expected.losses[: len(value.losses)], rel=1e-3)
            assert value.losses[0].total == pytest.approx(value.losses[0].nll)  # nothing is written yet
    for number in range(len(facts)):
        assert relative_error(found[eased][number].deltas[sites[0]], found[plain][number].deltas[sites[0]]) > 0.01
        assert len(found[ended][number].losses) < len(found[eased][number].losses)


def test_a_half_precision_model_gets_a_float32_delta_that_lowers_the_loss_as_in_full_precision(cache_dir: Path) -> None:
    lm = TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()
    site = lm.sites.mlp_out.format(LAYER)
    facts = rows_of(lm, REQUESTS[0])
    settings = replace(SETTINGS, learning_rate=0.1, weight_decay=0.0)
    (full,) = optimise(lm, facts, layer=LAYER, sites=[site], settings=settings)
    lm.module.to(torch.bfloat16)  # type: ignore[call-overload]
    (half,) = optimise(lm, facts, layer=LAYER, sites=[site], settings=settings)
    assert {half.deltas[site].dtype, half.inputs[site].dtype} == {torch.float32}
    drops = [value.losses[0].total - value.losses[-1].total for value in (full, half)]
    assert drops[0] > 0.05
    assert drops[1] == pytest.approx(drops[0], rel=0.2)
    assert float(torch.cosine_similarity(half.deltas[site], full.deltas[site], dim=0)) > 0.9


def test_an_attention_kernel_without_masks_is_refused(make: Make) -> None:
    lm = make("llama")
    facts = rows_of(lm, REQUESTS[0])
    lm.module.config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(EditError, match=r"flash_attention_2.*eager, sdpa"):
            optimise(lm, facts, layer=LAYER, sites=SITE_KINDS["mlp"](lm), settings=SETTINGS)
    finally:
        lm.module.config._attn_implementation = "sdpa"


def test_delta_never_leaves_the_clamp(make: Make) -> None:
    lm = make("gpt_neox")
    site = lm.sites.mlp_out.format(LAYER)
    settings = replace(SETTINGS, clamp_norm_factor=0.25, learning_rate=2.0)
    for value in optimise(lm, rows_of(lm, *REQUESTS), layer=LAYER, sites=[site], settings=settings):
        assert float(value.deltas[site].norm()) == pytest.approx(0.25 * float(value.initial[site].norm()), rel=1e-5)


def test_optimising_leaves_weights_gradients_and_random_state_as_found(make: Make) -> None:
    lm = make("llama")
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    random_state = torch.get_rng_state()
    optimise(lm, rows_of(lm, REQUESTS[0]), layer=LAYER, sites=SITE_KINDS["mlp"](lm), settings=SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.module.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.module.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.module.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_loss_that_is_no_number_names_the_fact(make: Make) -> None:
    lm = make("gpt2")
    settings = replace(SETTINGS, learning_rate=1e38, clamp_norm_factor=1e38)
    with pytest.raises(EditError, match=r"learning_rate.*long"):
        optimise(lm, rows_of(lm, REQUESTS[0]), layer=LAYER, sites=SITE_KINDS["mlp"](lm), settings=settings)


@pytest.mark.parametrize(
    ("field", "value"), [("num_steps", 1), ("learning_rate", 0.0), ("clamp_norm_factor", -1.0), ("weight_decay", -0.1), ("kl_factor", -1.0)]
)
def test_a_setting_that_cannot_work_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(SETTINGS, **{field: value})


@pytest.mark.parametrize("architecture", SITES)
def test_suffix_logits_with_nothing_added_are_the_models_own(make: Make, architecture: str) -> None:
    lm = make(architecture)
    (fact,) = rows_of(lm, REQUESTS[0])
    site = lm.sites.mlp_out.format(LAYER)
    suffix = SuffixPass(lm, fact.prompts, layer=LAYER, sites=[site])
    nothing = {site: torch.zeros_like(suffix.site_outputs[site])}
    with torch.no_grad():
        expected = lm.module(input_ids=pad_rows([row.input_ids for row in fact.prompts], torch.device("cpu"))).logits
    for number, row in enumerate(fact.prompts):
        length = len(row.input_ids) - row.subject_last
        hidden_ND = suffix.hidden(nothing, rows_N=torch.full((length,), number), positions_N=torch.arange(length))
        ours = next_token_logits(lm, hidden_ND)
        assert torch.allclose(ours, expected[number, row.subject_last : len(row.input_ids)], atol=1e-4)


@pytest.mark.parametrize("architecture", SITES)
def test_padding_behind_shorter_rows_goes_through_no_mlp(make: Make, architecture: str) -> None:
    lm = make(architecture)
    (fact,) = rows_of(lm, REQUESTS[0])
    rows = [*fact.prompts, fact.essence]  # one position of the essence prompt, several of the others
    lengths = [len(row.input_ids) - row.subject_last for row in rows]
    assert lengths[-1] == 1 < min(lengths[:-1])
    site = lm.sites.mlp_out.format(LAYER)
    suffix = SuffixPass(lm, rows, layer=LAYER, sites=[site])
    looked_at = torch.tensor([(number, position) for number, length in enumerate(lengths) for position in range(length)])
    seen: list[int] = []
    hooks = [
        lm.layer_module(lm.sites.mlp_out, index).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 0].numel()))
        for index in range(LAYER + 1, lm.description.num_layers)
    ]
    nothing = {site: torch.zeros_like(suffix.site_outputs[site])}
    with torch.no_grad():
        hidden_ND = suffix.hidden(nothing, rows_N=looked_at[:, 0], positions_N=looked_at[:, 1])
        for hook in hooks:
            hook.remove()
        ours = next_token_logits(lm, hidden_ND)
        whole = lm.module(input_ids=pad_rows([row.input_ids for row in rows], torch.device("cpu"))).logits
    starts = torch.tensor([row.subject_last for row in rows])
    assert torch.allclose(ours, whole[looked_at[:, 0], starts[looked_at[:, 0]] + looked_at[:, 1]], atol=1e-4)
    assert seen == [sum(lengths)] * len(hooks)
