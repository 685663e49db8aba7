"""Pretrained models: described without weights, known by their content, refused with a next step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoConfig, GPT2Config, GPTJConfig

from editeval.interfaces import ModelSource
from editeval.models import load as load_module
from editeval.models.fingerprint import fingerprint_of
from editeval.models.load import PretrainedModel, description_of, resolve_device, with_pad_token
from editeval.models.model import LanguageModel, end_tokens
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
HUB = sorted(
    path.stem for path in CONF.glob("*.yaml") if not path.stem.startswith("tiny-") and path.stem not in {"pretrained", "smollm2-135m"}
)


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def original(request: pytest.FixtureRequest, cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir, device="cpu").load()


@pytest.fixture(scope="module")
def folder(original: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint")
    original.module.save_pretrained(target)
    original.tokenizer.save_pretrained(target)
    return target


def source(name_or_path: object, cache: Path, **settings: Any) -> PretrainedModel:
    return PretrainedModel(name="mine", name_or_path=str(name_or_path), cache_dir=cache, device="cpu", **settings)


def no_weights(*_: object, **__: object) -> None:
    raise AssertionError("weights were loaded")


def test_a_saved_model_loads_with_the_same_weights_sites_and_fingerprint(original: LanguageModel, folder: Path, tmp_path: Path) -> None:
    lm = source(folder, tmp_path).load()
    for (name, one), (_, two) in zip(original.module.state_dict().items(), lm.module.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert lm.sites == original.sites
    assert lm.fingerprint == original.fingerprint
    assert lm.tokenizer("naïve Paris")["input_ids"] == original.tokenizer("naïve Paris")["input_ids"]
    assert not lm.module.training
    assert not any(parameter.requires_grad for parameter in lm.module.parameters())


def test_loading_leaves_the_global_generator_as_found(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    source(folder, tmp_path).load()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_description_needs_no_weights_and_equals_the_loaded_config(folder: Path, tmp_path: Path) -> None:
    lm = source(folder, tmp_path).load()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    assert source(bare, tmp_path).describe() == lm.description == description_of("mine", lm.module.config)


def test_a_known_fingerprint_needs_no_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = source(folder, tmp_path).load().fingerprint
    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", no_weights)
    assert source(folder, tmp_path).fingerprint() == loaded


def test_the_fingerprint_is_of_the_content_not_of_the_path(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert source(copy, tmp_path / "a").fingerprint() == source(folder, tmp_path / "b").fingerprint()


def test_another_dtype_is_another_model(folder: Path, tmp_path: Path) -> None:
    single, half = source(folder, tmp_path), source(folder, tmp_path, dtype="bfloat16")
    assert half.load().module.dtype == torch.bfloat16
    assert half.fingerprint() != single.fingerprint()


def test_changed_files_are_noticed_although_the_fingerprint_is_cached(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = source(copy, tmp_path).fingerprint()
    config = json.loads((copy / "config.json").read_text())
    key = "layer_norm_epsilon" if "layer_norm_epsilon" in config else "rms_norm_eps"
    (copy / "config.json").write_text(json.dumps(config | {key: 0.5}))
    assert source(copy, tmp_path).fingerprint() != before


def test_one_flipped_bit_changes_the_fingerprint(original: LanguageModel) -> None:
    weight = original.layer_module(original.sites.mlp_out, 3).get_parameter("weight")
    before = weight[5, 7].clone()
    weight.data.view(torch.int32)[5, 7] ^= 1
    changed = fingerprint_of(original.module, original.tokenizer)
    weight.data[5, 7] = before
    assert changed != original.fingerprint
    assert fingerprint_of(original.module, original.tokenizer) == original.fingerprint


def test_what_ends_a_text_is_part_of_the_fingerprint(original: LanguageModel, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [original.tokenizer.eos_token_id, 11]}))
    ended = source(copy, tmp_path).load()
    assert 11 in end_tokens(ended.module, ended.tokenizer)
    assert ended.fingerprint != original.fingerprint
    path.write_text(json.dumps(settings | {"temperature": 0.5, "do_sample": True}))  # no number here depends on it
    assert source(copy, tmp_path).fingerprint() == original.fingerprint


def test_a_chat_template_is_no_part_of_the_fingerprint_under_which_statistics_are_stored(original: LanguageModel) -> None:
    original.tokenizer.chat_template = "{{ messages[0].content }}"
    named = fingerprint_of(original.module, original.tokenizer)
    original.tokenizer.chat_template = None
    assert named == original.fingerprint


def test_a_hub_model_in_the_cache_is_known_by_its_commit_without_the_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = source("some/model", tmp_path)
    assert hub.load().fingerprint == source(folder, tmp_path).fingerprint()
    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", no_weights)
    assert hub.fingerprint() == source(folder, tmp_path).fingerprint()


def test_a_missing_padding_token_is_the_end_token_and_the_vocabulary_stays(original: LanguageModel, folder: Path, tmp_path: Path) -> None:
    lm = source(folder, tmp_path).load()
    assert lm.tokenizer.pad_token == lm.tokenizer.eos_token
    assert len(lm.tokenizer) == len(original.tokenizer)


def test_a_missing_tensor_is_refused_not_made_up(original: LanguageModel, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    name = f"{original.sites.mlp_out.format(2)}.weight"
    state = {key: value for key, value in original.module.state_dict().items() if key != name}
    original.module.save_pretrained(copy, state_dict=state)
    with pytest.raises(ConfigError, match=f"lacks 1 tensors, first '{name}'"):
        source(copy, tmp_path).load()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_layers_may_lie_on_the_devices_of_a_map(
    original: LanguageModel, folder: Path, tmp_path: Path, device_map: dict[str, str] | str
) -> None:
    lm = source(folder, tmp_path, device_map=device_map).load()
    assert lm.device_at(lm.sites.mlp_out.format(0)) == torch.device("cpu")
    assert lm.fingerprint == original.fingerprint


def test_weights_that_were_not_loaded_are_refused(original: LanguageModel) -> None:
    with torch.device("meta"):
        module = type(original.module)(original.module.config)
    with pytest.raises(ConfigError, match=r"does not fit in memory.*model\.dtype=bfloat16"):
        fingerprint_of(module, original.tokenizer)


@pytest.mark.parametrize(
    ("config", "inner"),
    [
        (GPT2Config(n_embd=48, n_head=4, n_inner=None), 192),
        (GPT2Config(n_embd=48, n_head=4, n_inner=100), 100),
        (GPTJConfig(n_embd=48, n_head=4), 192),
        (AutoConfig.for_model("llama", intermediate_size=77), 77),
    ],
)
def test_the_inner_width_is_known_in_every_family(config: Any, inner: int) -> None:
    assert description_of("any", config).intermediate_size == inner


def test_a_missing_hub_model_offline_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError,
        match=r"model mine: 'some/thing' is neither a folder nor .*offline|.*HF_HUB_OFFLINE is set.*hf download some/thing.*licence",
    ):
        source("some/thing", tmp_path).describe()


def test_a_hub_that_does_not_answer_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9 cannot be reached.*model\.name_or_path=<folder>"):
        source("some/thing", tmp_path).describe()


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "no-such-file.gguf"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        source(path, tmp_path).describe()


def test_an_unknown_architecture_fails_before_weights_and_says_what_to_add(tmp_path: Path) -> None:
    AutoConfig.for_model("bloom", n_layer=1).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConfigError, match=r"'bloom' is unknown; known: .*`Sites` record"):
        source(tmp_path / "bloom", tmp_path).describe()


@pytest.mark.parametrize("content", ["{}", "no json", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_folder_with_a_bad_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="broken cannot be loaded"):
        source(tmp_path / "broken", tmp_path).describe()


def test_a_folder_without_weights_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    with pytest.raises(ConfigError, match="bare cannot be loaded"):
        source(tmp_path / "bare", tmp_path).load()


def test_an_unknown_dtype_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype='fp8'; one of float32, bfloat16, float16"):
        source("x", tmp_path, dtype="fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match=r"model\.device='gpu'"):
        resolve_device("gpu")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="slow tokenizer object"):
        with_pad_token(object(), name="mine")


def test_the_name_of_the_built_in_model_is_not_lent_to_other_weights(tmp_path: Path) -> None:
    own = PretrainedModel(name="smollm2-135m", name_or_path="builtin:smollm2-135m", cache_dir=tmp_path)
    other = PretrainedModel(name="smollm2-135m", name_or_path="openai-community/gpt2", cache_dir=tmp_path)
    assert (own.label, other.label) == ("smollm2-135m", "gpt2")


@pytest.mark.parametrize("name", HUB)
def test_every_hub_yaml_is_a_source_named_as_its_file(name: str, cache_dir: Path) -> None:
    config = OmegaConf.create({"paths": {"cache": str(cache_dir)}, "model": OmegaConf.load(CONF / f"{name}.yaml")})
    made = instantiate(config.model)
    assert isinstance(made, ModelSource)
    assert isinstance(made, PretrainedModel)
    assert made.label == made.name == name
    assert made.name_or_path.count("/") == 1


def test_no_device_is_named_by_number_in_the_room() -> None:
    for path in Path(load_module.__file__).parent.glob("*.py"):
        assert "cuda:" not in path.read_text(), path


def test_the_project_talks_to_no_hub_in_tests() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
