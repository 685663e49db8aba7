"""IKE's examples and contexts, and that a model which reads its context answers as the fact says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.build import build
from editeval.files import Cache
from editeval.inference.adapters import RequestAdapter, Route
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.memory.demonstrations import pool_of
from editeval.memory.encoder import HashedEncoder
from editeval.types import ConfigError, EditRequest, Probe, SilentProgress
from tests.methods.reading import ATTENTION, FACTS, gains, reading_model

ROWS = tuple(
    EditRequest(
        request_id=str(number),
        prompt="{} is in",
        subject=f"Town {number}",
        target_new=f"Land {number}",
        paraphrase_prompts=(f"Where is Town {number}? In",) if number % 2 else (),
        neighborhood_prompts=(Probe(prompt="Rome is in", answer="Italy"),),
    )
    for number in range(20)
)


def method(compose_config: Callable[..., DictConfig], *overrides: str) -> EditMethod:
    return build(compose_config("method=ike", "model=tiny-gpt2", *overrides).method, "method", EditMethod)


def route_of(model: EditedModel, request: str) -> Route:
    assert isinstance(model.adapter, RequestAdapter)
    (route,) = model.adapter.routes([request])
    assert route is not None, "it is about an edited fact"
    return route


@pytest.mark.parametrize("architecture", ATTENTION)
def test_a_model_that_reads_answers_as_the_facts_say(compose_config: Callable[..., DictConfig], tmp_path: Path, architecture: str) -> None:
    model = EditedModel(reading_model(tmp_path, architecture))
    # One example: the mean over more of them says less about the fact.
    assert min(gains(model, method(compose_config, "method.demonstrations=1"), Cache(tmp_path))) > 0.5


def test_the_context_is_examples_the_fact_and_the_request(compose_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    model = EditedModel(reading_model(tmp_path))
    editor = method(compose_config).prepare(model, Cache(tmp_path), SilentProgress())
    model.apply(editor.edit([FACTS[0]], seed=0))
    prompt, fact = FACTS[0].full_prompt, f"{FACTS[0].full_prompt} {FACTS[0].target_new}"
    route = route_of(model, prompt)
    assert route.prefix == f"New Fact: {fact}\nPrompt: "
    assert len(route.demonstrations) == 5
    assert route.demonstrations[-1] == f"New Fact: {fact}\nPrompt: {fact}\n\n"
    assert all(text.startswith("New Fact: ") and text.endswith("\n\n") for text in route.demonstrations)
    assert FACTS[0].subject not in "".join(route.demonstrations[:-1])


def test_further_facts_stand_before_the_nearest(compose_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    model = EditedModel(reading_model(tmp_path))
    settings = ("method.facts=2", "method.similarity=0.1", "method.demonstrations=0")
    editor = method(compose_config, *settings).prepare(model, Cache(tmp_path), SilentProgress())
    model.apply(editor.edit(list(FACTS[:2]), seed=0))  # a batch is so many facts
    route = route_of(model, FACTS[1].full_prompt)
    first, second = (f"New Fact: {fact.full_prompt} {fact.target_new}\n" for fact in FACTS[:2])
    assert route.prefix == f"{first}{second}Prompt: "


def test_examples_come_nearest_last_in_the_ratio_of_their_kinds(tmp_path: Path) -> None:
    encoder = HashedEncoder()
    pool = pool_of(ROWS, encoder, Cache(tmp_path), SilentProgress())
    (statement,) = encoder.encode(["Town 7 is in Land 7"])
    examples = pool.examples(statement, count=16, ratio=(1, 3, 4))
    assert "Fact: Town 7 is in Land 7" in examples[-1]
    asked = [text.split("Prompt: ")[1] for text in examples]
    updates, retained = (sum(text.startswith(start) for text in asked) for start in ("Where", "Rome"))
    assert (len(asked) - updates - retained, updates, retained) == (2, 6, 8)
    again = pool_of(ROWS, encoder, Cache(tmp_path), SilentProgress())
    assert torch.equal(again.embeddings, pool.embeddings)
    assert len(pool.examples(statement, count=50, ratio=(0, 1, 0))) == 10  # only the rows that have a paraphrase


@pytest.mark.parametrize("wrong", ["method.ratio=[1,3]", "method.facts=0", "method.similarity=0", "method.demonstrations=-1"])
def test_settings_that_cannot_be_are_refused(compose_config: Callable[..., DictConfig], wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"method\."):
        method(compose_config, wrong)
