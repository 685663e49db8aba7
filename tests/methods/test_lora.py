"""LoRA through peft: the product is merged, and the model is left as found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editeval.edits.delta import LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.methods.lora import Editor, LoRA
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, SilentProgress

METHOD = LoRA(name="lora", rank=4, alpha=8, target_modules=None, layers=None, num_steps=6, learning_rate=0.01, facts_per_step=1)
REQUESTS = (
    EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Norway"),
)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def lm(request: pytest.FixtureRequest, cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir).load()


def editor(lm: LanguageModel, tmp_path: Path, method: LoRA = METHOD) -> Editor:
    method.check(lm.description)
    return method.prepare(EditedModel(lm), Cache(tmp_path), SilentProgress())


def shape_of(lm: LanguageModel) -> dict[str, object]:
    modules = {name: (id(module), module.training, sorted(vars(module))) for name, module in lm.module.named_modules()}
    parameters = {name: (id(each), each.requires_grad, each.grad) for name, each in lm.module.named_parameters()}
    return {"modules": modules, "parameters": parameters}


def test_nothing_of_peft_stays_in_the_model(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, seeded = editor(lm, tmp_path), list[int]()
    found, random_state = shape_of(lm), torch.get_rng_state()
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)  # called on a machine without a GPU too
    lora.edit(REQUESTS, seed=0)
    assert shape_of(lm) == found
    assert torch.equal(torch.get_rng_state(), random_state)
    assert seeded == []


def test_nothing_of_peft_stays_after_an_error(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    found, lora = shape_of(lm), editor(lm, tmp_path)
    monkeypatch.setattr("editeval.methods.lora.adam", fail)
    with pytest.raises(KeyboardInterrupt):
        lora.edit(REQUESTS[:1], seed=0)
    assert shape_of(lm) == found


def test_the_merged_update_is_the_adapters_in_effect(lm: LanguageModel, tmp_path: Path) -> None:
    """The loss of the next step, with adapters, equals the loss of the model with the update written into it."""
    six = editor(lm, tmp_path).edit(REQUESTS[:1], seed=3)
    seven = editor(lm, tmp_path, replace(METHOD, num_steps=7)).edit(REQUESTS[:1], seed=3)
    model = EditedModel(lm)
    model.apply(six)
    score = model.score([REQUESTS[0].full_prompt], [" English"])[0]
    model.restore()
    assert -score.log_prob / len(score.token_log_probs) == pytest.approx(seven.diagnostics["loss_last"], rel=1e-4)
    assert seven.diagnostics["loss_last"] < six.diagnostics["loss_first"]


def test_updates_have_the_rank_of_the_factors_and_the_seed_alone_draws_them(lm: LanguageModel, tmp_path: Path) -> None:
    edits = [editor(lm, tmp_path, replace(METHOD, layers=[1, 2])).edit(REQUESTS, seed=seed) for seed in (1, 1, 2)]
    for first, again, other in zip(*(edit.deltas for edit in edits), strict=True):
        assert isinstance(first, LowRankDelta)
        assert isinstance(again, LowRankDelta)
        assert isinstance(other, LowRankDelta)
        assert first.right.shape[0] == METHOD.rank
        assert torch.equal(first.left, again.left)
        assert not torch.equal(first.right, other.right)
        assert any(f".{layer}." in first.parameter for layer in (1, 2))


def test_settings_that_cannot_work_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="rank"):
        replace(METHOD, rank=0)
    with pytest.raises(ConfigError, match="layer 9"):
        replace(METHOD, layers=[9]).check(lm.description)
    with pytest.raises(ConfigError, match=r"method\.target_modules"):
        METHOD.check(replace(lm.description, model_type="phi3"))
