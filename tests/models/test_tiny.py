"""Tiny random models: the same for the same settings, different otherwise, and awkward on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from editeval.models.load import description_of
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
TINY = sorted(path.stem for path in CONF.glob("tiny-*.yaml"))
PROMPT = "The mother tongue of Danielle Darrieux is"


def tiny(cache_dir: Path, architecture: str = "llama", **settings: object) -> TinyModel:
    return TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=SITES)
def lm(request: pytest.FixtureRequest, cache_dir: Path) -> LanguageModel:
    return tiny(cache_dir, request.param).load()


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    architectures = {OmegaConf.load(CONF / f"{name}.yaml").architecture for name in TINY}
    assert architectures == set(SITES)


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_yaml_loads_a_model_of_its_description(cache_dir: Path, name: str) -> None:
    source = instantiate(OmegaConf.create({"paths": {"cache": str(cache_dir)}, "model": OmegaConf.load(CONF / f"{name}.yaml")}).model)
    loaded = source.load()
    assert source.describe() == loaded.description == description_of(name, loaded.module.config)
    assert loaded.description.num_layers == 4
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_logits_are_neither_flat_nor_certain(lm: LanguageModel) -> None:
    tokens = lm.tokenizer(PROMPT, return_tensors="pt").input_ids.to(lm.module.device)
    log_probs = torch.log_softmax(lm.module(input_ids=tokens).logits[0].float(), dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    uniform = torch.tensor(lm.description.vocab_size).log()
    assert (entropy < uniform - 0.5).all(), entropy
    assert (entropy > 1.0).all(), entropy


def test_every_parameter_matters(lm: LanguageModel) -> None:
    """Biases, norms and shared heads are random, so that leaving one out would show."""
    for name, parameter in lm.module.named_parameters():
        assert parameter.float().std() > 0.03, f"{name} is constant"


def test_offsets_and_decoding_agree_with_the_text(lm: LanguageModel) -> None:
    encoded = lm.tokenizer(PROMPT, return_offsets_mapping=True)
    pieces = [PROMPT[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(pieces) == PROMPT
    assert lm.tokenizer.decode(encoded["input_ids"], skip_special_tokens=True).strip() == PROMPT


def test_start_token_is_added_by_the_sentencepiece_kind_only(lm: LanguageModel) -> None:
    first = lm.tokenizer.convert_ids_to_tokens(lm.tokenizer(PROMPT)["input_ids"])[:2]
    assert first == (["<s>", "▁The"] if lm.sites.model_type in {"llama", "mistral", "gemma2", "phi3"} else ["The", "Ġm"])
    assert "<s>" not in lm.tokenizer.convert_ids_to_tokens(lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])


def test_unknown_letters_survive_as_bytes(lm: LanguageModel) -> None:
    text = "naïve 北京"
    assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_ids_stay_within_the_vocabulary_and_padding_exists(lm: LanguageModel) -> None:
    assert len(lm.tokenizer) <= lm.description.vocab_size
    assert lm.tokenizer.pad_token_id is not None
    assert lm.module.config.eos_token_id == lm.tokenizer.eos_token_id


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_a_model_is_equal_on_reload_and_differs_by_seed(architecture: str, cache_dir: Path) -> None:
    first, again = tiny(cache_dir, architecture).load(), tiny(cache_dir, architecture).load()
    other = tiny(cache_dir, architecture, seed=1).load()
    assert first.fingerprint == again.fingerprint == tiny(cache_dir, architecture).fingerprint()
    assert first.fingerprint != other.fingerprint
    for (name, one), (_, two) in zip(first.module.state_dict().items(), again.module.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_fingerprints_differ_between_architectures(cache_dir: Path) -> None:
    fingerprints = {architecture: tiny(cache_dir, architecture).fingerprint() for architecture in SITES}
    assert len(set(fingerprints.values())) == len(SITES)


def test_loading_leaves_the_global_generator_as_found(cache_dir: Path) -> None:
    before = torch.random.get_rng_state()
    tiny(cache_dir).load()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_embedding_is_the_head_where_the_family_ties_them(lm: LanguageModel) -> None:
    tied = lm.module.get_submodule(lm.sites.head).weight is lm.module.get_submodule(lm.sites.embedding).weight
    assert tied == (lm.sites.model_type in {"gpt2", "qwen3", "gemma2"})


def test_a_sliding_window_hides_what_lies_before_it(cache_dir: Path) -> None:
    lm = tiny(cache_dir, "mistral", num_layers=1, overrides={"sliding_window": 4}).load()
    tokens = torch.arange(10, 20, device=lm.module.device)[None]
    changed = tokens.clone()
    changed[0, 0] = 500
    difference = (lm.module(input_ids=tokens).logits - lm.module(input_ids=changed).logits).abs().amax(-1)[0]
    assert difference[3] > 1e-3
    assert difference[4:].max() < 1e-5


def test_a_config_that_the_family_refuses_is_named(cache_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"transformers refuses this gemma2 config"):
        tiny(cache_dir, "gemma2", hidden_size=66).describe()


def test_an_unknown_architecture_is_refused_before_anything_is_built(cache_dir: Path) -> None:
    with pytest.raises(ConfigError, match="'bert' is unknown"):
        tiny(cache_dir, "bert")
