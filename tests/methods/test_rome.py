"""What ROME promises beyond the numbers: exact constraints, clear refusals, settings that key a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.build import build
from editeval.edits.delta import LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.keyvalue.lookup import locate
from editeval.keyvalue.target_value import TargetValue
from editeval.methods.rome import KEYS, ROME, rank_one_update
from editeval.models.tiny import TinyModel
from editeval.models.trace import capture
from editeval.types import ConfigError, EditError, EditRequest, SilentProgress

REQUEST = EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
CONTEXTS = ["{}", "Yesterday. {}", "Because of the rain. {}"]


@pytest.fixture(scope="module")
def rome(compose_config: Callable[..., DictConfig]) -> ROME:
    config = compose_config("method=rome", "model=tiny-gpt2", "corpus.tokens=2000", "method.num_steps=6")
    method = build(config.method, "method", EditMethod)
    assert isinstance(method, ROME)
    return replace(method, context_prefixes=CONTEXTS, layer=1)


@pytest.fixture(scope="module")
def model(cache_dir: Path) -> EditedModel:
    return EditedModel(TinyModel(name="tiny", architecture="gpt2", cache_dir=cache_dir).load())


@dataclass(frozen=True)
class Listening(SilentProgress):
    """Keeps what was said."""

    said: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.said.append(text)


def key_at(model: EditedModel, site: str, context: str) -> torch.Tensor:
    located = locate(model.lm.tokenizer, REQUEST.prompt, REQUEST.subject, context=context)
    with torch.no_grad(), capture(model.lm.module, [site], inputs=True) as trace:
        model.lm.module(input_ids=torch.tensor([located.token_ids]))
    return trace.inputs[site][0, located.subject_last]


@pytest.mark.parametrize("key", KEYS)
def test_the_edited_matrix_maps_the_chosen_key_to_the_target_value(rome: ROME, model: EditedModel, cache_dir: Path, key: str) -> None:
    from editeval.keyvalue.target_value import fact_rows, optimise

    model.restore()
    editor = replace(rome, key=key).prepare(model, Cache(cache_dir), SilentProgress())
    value = optimise(
        model.lm, [fact_rows(model.lm.tokenizer, REQUEST, CONTEXTS)], layer=1, sites=[editor.site], settings=editor.target_settings
    )[0]
    target = value.initial[editor.site] + value.deltas[editor.site]
    model.apply(editor.edit([REQUEST], seed=0))
    keys = torch.stack([key_at(model, editor.site, context) for context in CONTEXTS])
    chosen = keys.mean(dim=0) if key == "consistent" else keys[0]
    bias = model.lm.module.get_submodule(editor.site).bias
    reached = model.weight(f"{editor.site}.weight") @ chosen + bias
    assert torch.allclose(reached, target, atol=1e-3 * float(target.norm()))
    model.restore()


def test_a_bare_key_unlike_the_mean_key_blows_up_only_the_published_update() -> None:
    """The first token of a text has a key of its own: without a prefix such a subject's key is nearly orthogonal to C^-1 k_*."""
    width, site = 16, "site"
    generator = torch.Generator().manual_seed(0)
    prefixed = torch.randn(width, generator=generator).expand(4, width) + 0.01 * torch.randn(4, width, generator=generator)
    direction = prefixed.mean(dim=0) / prefixed.mean(dim=0).norm()
    bare = torch.randn(width, generator=generator)
    bare = 0.3 * (bare - (bare @ direction) * direction)  # the mean over all five keys still points along `direction`, mostly
    keys = torch.cat([bare[None], prefixed])
    nothing = torch.zeros(5, 3)
    delta = torch.ones(3)
    value = TargetValue(deltas={site: delta}, initial={site: nothing[0]}, inputs={site: keys}, outputs={site: nothing}, losses=())
    published, consistent = (rank_one_update(value, site, factor=None, key=key) for key in ("mean", "consistent"))
    divisor = float(consistent.right @ keys.mean(dim=0))
    assert divisor == pytest.approx(float(keys.mean(dim=0).norm()), rel=1e-5)  # a norm, so positive
    assert float(consistent.left.norm()) == pytest.approx(float(delta.norm()) / divisor, rel=1e-5)
    assert float(published.left.norm()) > 3 * float(consistent.left.norm())


def test_the_update_has_rank_one_and_is_float32_on_the_cpu(rome: ROME, model: EditedModel, cache_dir: Path) -> None:
    slow = replace(rome, learning_rate=0.1, weight_decay=0.0, num_steps=12)
    edit = slow.prepare(model, Cache(cache_dir), SilentProgress()).edit([REQUEST], seed=0)
    (delta,) = edit.deltas
    assert isinstance(delta, LowRankDelta)
    assert (delta.left.shape, delta.right.shape) == ((64, 1), (1, 256))
    assert {delta.left.dtype, delta.right.dtype} == {torch.float32}
    assert delta.parameter == "transformer.h.1.mlp.c_proj.weight"
    assert edit.diagnostics["loss_last"] < edit.diagnostics["loss_first"]
    assert edit.diagnostics["target_log_prob_last"] > edit.diagnostics["target_log_prob_first"]


def test_the_covariance_changes_the_direction_and_leaving_it_out_means_identity(rome: ROME, model: EditedModel, cache_dir: Path) -> None:
    directions = {}
    for use in (True, False):
        listening = Listening()
        editor = replace(rome, use_covariance=use).prepare(model, Cache(cache_dir), listening)
        assert any("C = I" in text for text in listening.said) != use
        (delta,) = editor.edit([REQUEST], seed=0).deltas
        assert isinstance(delta, LowRankDelta)
        directions[use] = delta.right[0]
    mean_key = torch.stack([key_at(model, editor.site, context) for context in CONTEXTS]).mean(dim=0)
    assert torch.allclose(directions[False], mean_key / mean_key.norm(), atol=1e-5)
    assert not torch.allclose(directions[True], directions[False], atol=1e-2)


def test_statistics_and_prefixes_are_of_the_unedited_model_even_after_edits(rome: ROME, model: EditedModel, tmp_path: Path) -> None:
    generated = replace(rome, context_prefixes=None, prefix_lengths=[[4, 5]])
    model.restore()
    before = generated.prepare(model, Cache(tmp_path / "before"), SilentProgress())
    model.apply(before.edit([REQUEST], seed=0))
    after = generated.prepare(model, Cache(tmp_path / "after"), SilentProgress())
    assert after.contexts == before.contexts
    assert after.factor is not None
    assert before.factor is not None
    assert torch.equal(after.factor.lower, before.factor.lower)
    assert model.num_applied == 1
    model.restore()


def test_a_layer_left_open_is_the_published_relative_depth_and_the_run_says_so(rome: ROME, model: EditedModel, cache_dir: Path) -> None:
    listening = Listening()
    editor = replace(rome, layer=None).prepare(model, Cache(cache_dir), listening)
    assert editor.layer == round(4 * 17 / 48)
    assert any("layer 1 of 4" in text for text in listening.said)


@pytest.mark.parametrize("layer", [-1, 4, 40])
def test_a_layer_that_the_model_does_not_have_is_named_with_what_is_allowed(rome: ROME, model: EditedModel, layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer {layer} not in 0\.\.3 of tiny; set method\.layer"):
        replace(rome, layer=layer).check(model.lm.description)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"key": "median"}, "method.key='median'.*mean, consistent, prompt"),
        ({"num_steps": 1}, "num_steps"),
        ({"context_prefixes": ["Yes. {}"]}, "first context prefix"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_it_is_made(rome: ROME, change: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        replace(rome, **change)  # type: ignore[arg-type]


def test_more_than_one_fact_an_edit_is_refused_with_the_ids(rome: ROME, model: EditedModel, cache_dir: Path) -> None:
    editor = rome.prepare(model, Cache(cache_dir), SilentProgress())
    with pytest.raises(EditError, match=r"batch_size=1.*\[request a, b\]"):
        editor.edit([REQUEST, replace(REQUEST, request_id="b")], seed=0)


def test_settings_change_with_whatever_changes_the_edits_and_with_nothing_else(rome: ROME, tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [
        {"layer": 2},
        {"learning_rate": 0.1},
        {"key": "prompt"},
        {"use_covariance": False},
        {"context_prefixes": CONTEXTS[:2]},
        {"context_prefixes": None},
        {"corpus": replace(rome.corpus, tokens=2001)},  # type: ignore[type-var]
    ]
    variants = [replace(rome, **change).settings() for change in changes]  # type: ignore[arg-type]
    assert all(variant != rome.settings() for variant in variants)
    assert replace(rome, prefix_seed=5).settings() == rome.settings()  # prefixes are given, so no seed is used
    assert replace(rome, name="another-label").settings() == rome.settings()
