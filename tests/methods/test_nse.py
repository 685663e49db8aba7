"""What NSE promises beyond the contract: values of the unedited model, few neurons, rounds, and a memory of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.build import build
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, Editor
from editeval.keyvalue.walk import LayerWalk
from editeval.methods.nse import select_neurons
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, SilentProgress

LAYERS = "method.layers=[1,2]"
REQUESTS = (
    EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Norway"),
    EditRequest(request_id="c", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa"),
)
Made = Callable[..., tuple[EditedModel, Editor]]


@pytest.fixture(scope="module")
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()


@pytest.fixture
def made(lm: LanguageModel, compose_config: Callable[..., DictConfig], cache_dir: Path) -> Iterator[Made]:
    models: list[EditedModel] = []

    def model_and_editor(name: str, *overrides: str) -> tuple[EditedModel, Editor]:
        config = compose_config(f"method={name}", "model=tiny-llama", "corpus.tokens=2000", LAYERS, *overrides)
        model = EditedModel(lm)
        models.append(model)
        return model, build(config.method, "method", EditMethod).prepare(model, Cache(cache_dir), SilentProgress())

    yield model_and_editor
    for model in models:
        model.restore()


def disturb(model: EditedModel, *, scale: float) -> None:
    """Apply what earlier edits may have done to the model: a random update below the last edited layer."""
    site = model.lm.sites.mlp_out.format(1)
    left = scale * torch.randn(model.lm.description.hidden_size, 1, generator=torch.Generator().manual_seed(0))
    right = torch.randn(1, model.lm.description.intermediate_size, generator=torch.Generator().manual_seed(1))
    model.apply(Edit(deltas=(LowRankDelta(parameter=f"{site}.weight", left=left, right=right),)))


def change(edit: Edit, number: int) -> torch.Tensor:
    delta = edit.deltas[number]
    assert isinstance(delta, LowRankDelta)
    return delta.left.double() @ delta.right.double()


def test_target_values_are_of_the_unedited_model_whatever_was_edited_before(made: Made) -> None:
    """MEMIT's are of the model as it is: the same facts then start from another loss."""
    names = ("loss_first", "loss_last", "delta_norm")
    model, editor = made("nse")
    before = editor.edit(REQUESTS[:2], seed=0)
    disturb(model, scale=0.3)
    after = editor.edit(REQUESTS[:2], seed=0)
    assert [after.diagnostics[name] for name in names] == [before.diagnostics[name] for name in names]
    assert float((change(after, 0) - change(before, 0)).norm()) > 0.1 * float(change(before, 0).norm())  # the way there is another
    _, memit = made("memit")
    assert memit.edit(REQUESTS[:2], seed=0).diagnostics["loss_first"] != pytest.approx(before.diagnostics["loss_first"], rel=1e-3)


def test_one_round_of_all_neurons_without_earlier_keys_is_memit(made: Made) -> None:
    _, nse = made("nse", "method.neuron_share=1", "method.max_rounds=1", "method.covariance_weight=7")
    _, memit = made("memit", "method.covariance_weight=7")
    ours, theirs = nse.edit(REQUESTS, seed=0), memit.edit(REQUESTS, seed=0)
    for number in range(2):
        assert torch.allclose(change(ours, number), change(theirs, number), rtol=1e-3, atol=1e-6)


def test_only_the_most_active_neurons_are_written(made: Made, lm: LanguageModel) -> None:
    _, editor = made("nse", "method.neuron_share=0.4", "method.max_rounds=1")
    edit = editor.edit(REQUESTS[:2], seed=0)
    first = edit.deltas[0]
    assert isinstance(first, LowRankDelta)
    activity = edit.auxiliary[f"keys.{lm.sites.mlp_out.format(1)}"].abs().sum(dim=0)
    written = (first.right != 0).any(dim=0)
    assert 0 < int(written.sum()) < len(written)
    assert float(activity[written].min()) >= float(activity[~written].max())
    assert float(activity[written].sum()) >= 0.4 * float(activity.sum())
    without_least = float(activity[written].sum() - activity[written].min())
    assert without_least < 0.4 * float(activity.sum())


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.4, [2]), (0.5, [2]), (0.51, [2, 0]), (0.8, [2, 0]), (0.81, [2, 0, 3]), (1.0, [2, 0, 3, 1])]
)
def test_the_fewest_neurons_that_hold_the_share_are_selected(share: float, chosen: list[int]) -> None:
    assert select_neurons(torch.tensor([3.0, 0.5, 5.0, 1.5], dtype=torch.float64), share=share).tolist() == chosen


def test_more_rounds_leave_less_missing_and_end_when_it_is_enough(made: Made) -> None:
    def edited(*overrides: str) -> Edit:
        return made("nse", "method.covariance_weight=100", *overrides)[1].edit(REQUESTS, seed=0)

    missing = [edited(f"method.max_rounds={rounds}", "method.enough=1e-6").diagnostics["missing_after"] for rounds in (1, 2, 4)]
    assert missing[0] > 1.1 * missing[1] > 1.1**2 * missing[2]
    generous = edited("method.max_rounds=9", f"method.enough={2 * missing[1]}").diagnostics
    assert generous["rounds"] < 9
    assert generous["missing_after"] < 2 * missing[1]


def test_the_update_of_all_rounds_brings_the_model_where_the_rounds_said(made: Made, lm: LanguageModel) -> None:
    """Rounds run beside the weights; what is then written must do the same."""
    model, editor = made("nse", "method.max_rounds=3")
    edit = editor.edit(REQUESTS, seed=0)
    model.apply(edit)
    facts = [replace(request, request_id=f"again-{request.request_id}") for request in REQUESTS]
    again = editor.edit(facts, seed=0).diagnostics
    left_over = edit.diagnostics["missing_after"]
    if again["rounds"]:
        assert again["missing_first"] <= 2 * left_over * len(REQUESTS)
    assert again["missing_after"] <= left_over * 1.001


def test_a_fact_that_is_too_far_is_left_alone(made: Made) -> None:
    model, editor = made("nse", "method.too_far=1e-6")
    edit = editor.edit(REQUESTS[:1], seed=0)
    assert edit.deltas == ()
    assert edit.diagnostics["rounds"] == 0
    model.apply(edit)
    assert model.num_applied == 1


def test_later_edits_keep_the_keys_of_earlier_ones(made: Made) -> None:
    model, editor = made("nse", "method.max_rounds=1", "method.covariance_weight=1e-3")
    first = editor.edit([REQUESTS[0]], seed=0)
    model.apply(first)
    near = replace(REQUESTS[0], request_id="near", prompt="The native language of {} is", target_new="Dutch")
    remembering = editor.edit([near], seed=0)
    model.auxiliary[0] = {}
    forgetful = editor.edit([near], seed=0)

    def disturbance(edit: Edit) -> float:
        norms = []
        for delta in edit.deltas:
            assert isinstance(delta, LowRankDelta)
            key = first.auxiliary[f"keys.{delta.parameter.removesuffix('.weight')}"]
            norms.append(float((delta.left @ (delta.right @ key.T)).norm()))
        return max(norms)

    assert disturbance(remembering) < 0.9 * disturbance(forgetful)


def test_recorded_keys_are_those_of_the_edited_model(made: Made, lm: LanguageModel) -> None:
    from editeval.keyvalue.target_value import fact_rows

    model, editor = made("nse", "method.context_prefixes=['{}']")
    edit = editor.edit(REQUESTS[:2], seed=0)
    model.apply(edit)
    walk = LayerWalk(lm, [fact_rows(lm.tokenizer, request, ["{}"]) for request in REQUESTS[:2]], first=2, last=2)
    site = lm.sites.mlp_out.format(2)
    assert torch.allclose(edit.auxiliary[f"keys.{site}"], walk.keys(site), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("field", ["covariance_weight", "enough", "too_far", "neuron_share", "max_rounds"])
def test_a_setting_that_cannot_work_is_named(made: Made, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        made("nse", f"method.{field}=0")
