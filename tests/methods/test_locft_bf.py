"""LocFT-BF: breadth-first over all facts, and refused as a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from editeval.edits.delta import DenseDelta, Edit
from editeval.experiment import assemble
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.fine_tuning import target_row
from editeval.methods.locft_bf import LocFTBF
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, SilentProgress

METHOD = LocFTBF(name="locft-bf", layer=2, place="mlp_out", num_epochs=12, learning_rate=5e-3, facts_per_step=2, stop_loss=0.01)
REQUESTS = tuple(
    EditRequest(request_id=str(number), prompt=prompt, subject=subject, target_new=target)
    for number, (prompt, subject, target) in enumerate(
        [
            ("The mother tongue of {} is", "Danielle Darrieux", "English"),
            ("{} is the capital of", "Port Moresby", "Norway"),
            ("In which city was {} founded? It was", "Nokia", "Tampa"),
        ]
    )
)


@pytest.fixture(scope="module")
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()


def edit_of(lm: LanguageModel, tmp_path: Path, method: LocFTBF = METHOD, seed: int = 0) -> Edit:
    return method.prepare(EditedModel(lm), Cache(tmp_path), SilentProgress()).edit(REQUESTS, seed=seed)


def test_one_edit_makes_all_facts_likely(lm: LanguageModel, tmp_path: Path) -> None:
    model = EditedModel(lm)

    def log_probs() -> list[float]:
        scores = model.score([each.full_prompt for each in REQUESTS], [f" {each.target_new}" for each in REQUESTS])
        return [score.log_prob for score in scores]

    before = log_probs()
    model.apply(edit_of(lm, tmp_path))
    gains = [after - earlier for after, earlier in zip(log_probs(), before, strict=True)]
    model.restore()
    assert min(gains) > 1


def test_the_seed_orders_the_facts_and_nothing_else_is_random(lm: LanguageModel, tmp_path: Path) -> None:
    first, again, other = (edit_of(lm, tmp_path, seed=seed).deltas[0] for seed in (1, 1, 2))
    assert isinstance(first, DenseDelta)
    assert isinstance(again, DenseDelta)
    assert isinstance(other, DenseDelta)
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, other.value)


def test_targets_end_with_the_end_of_sequence(lm: LanguageModel) -> None:
    row = target_row(lm.tokenizer, REQUESTS[0], scored_at="target", max_tokens=100, with_end=True)
    assert row.tokens[-1] == lm.tokenizer.eos_token_id
    assert len(row.input_ids) == row.positions[-1] + 1


@pytest.mark.parametrize(("place", "maps"), [("mlp_out", 1), ("mlp", 3), ("attention", 4), ("layers", 7)])
def test_the_linear_maps_of_one_place_are_tuned(lm: LanguageModel, place: str, maps: int, tmp_path: Path) -> None:
    edit = edit_of(lm, tmp_path, replace(METHOD, place=place, num_epochs=1))
    assert len(edit.deltas) == maps
    assert all(".2." in delta.parameter for delta in edit.deltas)


def test_a_stream_of_edits_is_refused_with_the_settings_that_work(compose_config: Callable[..., DictConfig]) -> None:
    settings = ("method=locft-bf", "model=tiny-llama", "callback=silent")
    with pytest.raises(ConfigError, match="set batch_size=20 num_edits=1 for the same 20 facts"):
        assemble(compose_config(*settings, "num_edits=[1,10]", "batch_size=2"))
    assert assemble(compose_config(*settings, "num_edits=1", "batch_size=20")).batch_size == 20


@pytest.mark.parametrize("wrapper", ["rect", "prune", "random"])
def test_a_stream_of_edits_is_refused_of_a_method_that_follows_it(compose_config: Callable[..., DictConfig], wrapper: str) -> None:
    settings = (f"method={wrapper}", "method@of=locft-bf", "model=tiny-llama", "callback=silent")
    with pytest.raises(ConfigError, match=f"method {wrapper} writes all facts in one edit.*set batch_size=2 num_edits=1"):
        assemble(compose_config(*settings, "num_edits=2"))
    assert assemble(compose_config(*settings, "num_edits=1", "batch_size=2")).batch_size == 2


def test_settings_that_cannot_work_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="place"):
        replace(METHOD, place="head")
    with pytest.raises(ConfigError, match="layer 9"):
        replace(METHOD, layer=9).check(lm.description)
