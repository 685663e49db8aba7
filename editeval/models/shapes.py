"""Shapes of the models that `conf/model` names, so that their needs can be told where none of their files is.

Numbers are those of each model's published `config.json`; what is left out is the default of transformers' config class.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

SMALL_EXTRAS = 1 << 16  # buffers such as rotary tables, which no parameter counts


def published_config(name_or_path: str) -> PreTrainedConfig | None:
    """Return the config of a model that `conf/model` names, from this file alone; None for any other."""
    shape = _SHAPES.get(name_or_path)
    if shape is None:
        return None
    return AutoConfig.for_model(shape["model_type"], **{name: value for name, value in shape.items() if name != "model_type"})


def is_gated(name_or_path: str) -> bool:
    """Return whether the hub asks for a licence to be accepted before it gives this model's files."""
    return name_or_path.startswith("meta-llama/")


def weight_bytes(config: PreTrainedConfig, *, element_bytes: int) -> int:
    """Return what the weights of a model take, by building it without storage; tied weights count once."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    parameters: int = sum(parameter.numel() for parameter in module.parameters())
    return parameters * element_bytes + SMALL_EXTRAS


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _neox(width: int, layers: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }


def _gated(
    model_type: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


_LLAMA2_7B = _gated("llama", 4096, 11008, 32, 32, 32, 32000, 4096)
_LLAMA31_8B = _gated("llama", 4096, 14336, 32, 32, 8, 128256, 131072)
_MISTRAL_7B = _gated("mistral", 4096, 14336, 32, 32, 8, 32000, 32768)
_QWEN25_7B = _gated("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072)

_SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "builtin:smollm2-135m": _gated("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),
        "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
        "EleutherAI/gpt-j-6b": {"model_type": "gptj"},
        "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
        "meta-llama/Llama-2-7b-chat-hf": _LLAMA2_7B,
        "meta-llama/Llama-2-13b-hf": _gated("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
        "meta-llama/Llama-3.1-8B": _LLAMA31_8B,
        "meta-llama/Llama-3.1-8B-Instruct": _LLAMA31_8B,
        "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
        "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL_7B,
        "Qwen/Qwen2.5-7B": _QWEN25_7B,
        "Qwen/Qwen2.5-7B-Instruct": _QWEN25_7B,
        "EleutherAI/pythia-160m": _neox(768, 12, 12),
        "EleutherAI/pythia-410m": _neox(1024, 24, 16),
        "EleutherAI/pythia-1b": _neox(2048, 16, 8),
        "EleutherAI/pythia-1.4b": _neox(2048, 24, 16),
        "EleutherAI/pythia-2.8b": _neox(2560, 32, 32),
        "EleutherAI/pythia-6.9b": _neox(4096, 32, 32, 50432),
        "EleutherAI/pythia-12b": _neox(5120, 36, 40, 50688),
    }
)
