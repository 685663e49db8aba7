"""What WISE promises beyond the contract: masks, margins, and memories that are made and merged on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.build import build
from editeval.edits.delta import SideMemoryDelta
from editeval.files import Cache
from editeval.inference.adapters_side_memory import SideMemoryAdapter
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.keyvalue.suffix import next_token_logits
from editeval.methods.wise import WISE, Editor, site_inputs, violated
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.models.trace import capture
from editeval.types import ConfigError, EditRequest, ModelDescription, SilentProgress

FACTS = (
    EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Norway"),
    EditRequest(request_id="c", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa"),
)
BARE = "method.context_prefixes=['{}']"
Made = Callable[..., tuple[EditedModel, Editor, SideMemoryAdapter]]


@pytest.fixture(scope="module")
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()


@pytest.fixture
def configured(compose_config: Callable[..., DictConfig]) -> Callable[..., WISE]:
    def made(*overrides: str) -> WISE:
        method = build(compose_config("method=wise", "model=tiny-llama", BARE, *overrides).method, "method", EditMethod)
        assert isinstance(method, WISE)
        return method

    return made


@pytest.fixture
def made(lm: LanguageModel, configured: Callable[..., WISE], cache_dir: Path) -> Iterator[Made]:
    models: list[EditedModel] = []

    def prepared(*overrides: str) -> tuple[EditedModel, Editor, SideMemoryAdapter]:
        model = EditedModel(lm)
        models.append(model)
        editor = configured(*overrides).prepare(model, Cache(cache_dir), SilentProgress())
        assert isinstance(model.adapter, SideMemoryAdapter)
        return model, editor, model.adapter

    yield prepared
    for model in models:
        model.restore()


def write(model: EditedModel, editor: Editor, facts: Sequence[EditRequest]) -> None:
    for fact in facts:
        model.apply(editor.edit([fact], seed=0))


def test_one_step_is_the_masked_gradient_of_the_target_in_the_copied_weight(lm: LanguageModel, made: Made) -> None:
    """At the start every activation is 0, where the margins have no gradient yet."""
    _, editor, adapter = made("method.num_steps=1", "method.learning_rate=0.5")
    (delta,) = editor.edit(FACTS[:1], seed=0).deltas
    assert isinstance(delta, SideMemoryDelta)
    (pair,) = editor._pairs(FACTS[0])
    weight = lm.module.get_submodule(adapter.site).get_parameter("weight")
    weight.requires_grad_(True)
    last = lm.sites.layers.format(lm.description.num_layers - 1)
    with torch.enable_grad(), capture(lm.module, [last], outputs=True, detach=False) as trace:
        lm.module.base_model(input_ids=torch.tensor([[*pair.context, *pair.continuation[:-1]]]), use_cache=False)
        logits = next_token_logits(lm, trace.outputs[last][0, len(pair.context) - 1 :])
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(pair.continuation))
    (gradient,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    assert torch.allclose(delta.values, -0.5 * gradient[adapter.mask(0)], rtol=1e-3, atol=1e-6)


def test_an_edited_prompt_moves_the_memory_and_an_unrelated_one_does_not(lm: LanguageModel, made: Made) -> None:
    margins = ("method.alpha=1", "method.beta=6", "method.gamma=4", "method.num_steps=60", "method.learning_rate=0.2")
    model, editor, adapter = made(*margins, "method.irrelevant_prompts=3")
    edit = editor.edit(FACTS[:1], seed=0)
    model.apply(edit)
    (memory,) = adapter.memories
    edited = site_inputs(lm, adapter.site, [lm.tokenizer(FACTS[0].full_prompt)["input_ids"]]).activations(memory.difference)
    others = site_inputs(lm, adapter.site, editor._others(0)).activations(memory.difference)
    assert float(edited) > 2 * float(others.max())
    assert memory.activation == pytest.approx(float(edited), rel=1e-4)
    unrelated = [editor.irrelevant[number] for number in torch.randperm(len(editor.irrelevant), generator=_generator(0))[:3].tolist()]
    for prompt in unrelated:  # one by one: beside others a pass is another, and rounds otherwise
        assert model.score([prompt], [" a"]) == EditedModel(lm).score([prompt], [" a"])
    assert model.score([FACTS[0].full_prompt], [" English"]) != EditedModel(lm).score([FACTS[0].full_prompt], [" English"])


def test_facts_of_one_memory_move_its_mask_alone_and_the_next_memory_has_another(made: Made) -> None:
    model, editor, adapter = made("method.shard_edits=2", "method.merge_shards=3")
    write(model, editor, FACTS)
    first, second = adapter.memories
    for memory, number in ((first, 0), (second, 1)):
        assert not bool(memory.difference[~adapter.mask(number)].any())
        assert bool(memory.difference[adapter.mask(number)].any())
    assert (first.edits, second.edits) == (2, 1)


def test_memories_are_merged_on_the_way_and_their_facts_still_answer(made: Made) -> None:
    model, editor, adapter = made("method.shard_edits=1", "method.merge_shards=2")
    before = [model.score([fact.full_prompt], [f" {fact.target_new}"])[0].log_prob for fact in FACTS[:2]]
    write(model, editor, FACTS[:2])
    (memory,) = adapter.memories
    assert memory.edits == 2
    after = [model.score([fact.full_prompt], [f" {fact.target_new}"])[0].log_prob for fact in FACTS[:2]]
    assert all(new > old + 1 for new, old in zip(after, before, strict=True))


def test_no_element_moves_further_than_its_bound(made: Made) -> None:
    model, editor, adapter = made("method.max_change=0.01")
    write(model, editor, FACTS[:1])
    assert float(adapter.memories[0].difference.abs().max()) == pytest.approx(0.01)


def test_training_ends_when_the_loss_is_low_and_steady(made: Made) -> None:
    _, editor, _ = made("method.stop_loss=1e9", "method.learning_rate=1e-9", "method.num_steps=50")
    assert editor.edit(FACTS[:1], seed=0).diagnostics["steps"] == 2


def test_margins_that_are_not_kept_are_averaged_alone() -> None:
    assert float(violated(torch.tensor([3.0, -1.0, 1.0]))) == 2.0
    assert float(violated(torch.tensor([-3.0, -1.0]))) == 0.0


def test_the_relative_depth_gives_the_published_layer_for_llama(configured: Callable[..., WISE], lm: LanguageModel) -> None:
    llama: ModelDescription = replace(lm.description, num_layers=32)
    assert configured()._layer(llama) == 27


@pytest.mark.parametrize(
    "override", ["num_steps=0", "learning_rate=0", "mask_share=0", "density=1.5", "threshold=0", "shard_edits=0", "irrelevant_prompts=0"]
)
def test_a_setting_that_cannot_work_is_named(configured: Callable[..., WISE], override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        configured(f"method.{override}")


def test_a_layer_that_the_model_does_not_have_is_refused(configured: Callable[..., WISE], lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"method\.layer"):
        configured("method.layer=99").check(lm.description)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
