"""Random models made from a seed, one of every architecture in the table of sites: small enough for tests, awkward enough to matter.

    python launch.py model=tiny-llama

Built from each family's real config and model class. Nothing is at a convenient value: biases and norms are random, key and value heads
are shared, windows slide, so that code which forgets one of them gives other numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from editeval.files import Cache
from editeval.models.fingerprint import fingerprint_of
from editeval.models.load import description_of, frozen, resolve_device, with_pad_token
from editeval.models.model import LanguageModel
from editeval.models.sites import Sites, sites_for
from editeval.models.tiny_tokenizers import byte_level, sentencepiece_like
from editeval.types import ConfigError, ModelDescription, content_key, seed_for

_RECIPE = 1  # a new number where the code below gives other weights for the same settings


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A random model of one architecture (a `ModelSource`), float32.

    `overrides` are passed on to the architecture's config class (`{sliding_window: 8}`).

    Raises:
        ConfigError: an architecture without sites.
    """

    dtype: ClassVar[str] = "float32"

    name: str
    architecture: str
    cache_dir: str | Path
    seed: int = 0
    num_layers: int = 4
    hidden_size: int = 64
    num_heads: int = 4
    vocab_size: int = 1000
    max_positions: int = 1024
    device: str = "auto"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sites_for(self.architecture)

    @property
    def name_or_path(self) -> str:
        """Its name alone: it has no files."""
        return self.name

    def missing_files(self) -> tuple[str, ...]:
        """Return nothing: it is made, not fetched."""
        return ()

    def describe(self) -> ModelDescription:
        """Return the model's shape from its config alone."""
        return description_of(self.name, self.config())

    def load(self) -> LanguageModel:
        """Return the model: the same weights and tokenizer for the same settings, whatever ran before.

        Raises:
            ConfigError: a device that this machine lacks, or a config that the architecture refuses.
        """
        device = resolve_device(self.device)
        config = self.config()
        sites = sites_for(self.architecture)
        tokenizer = self.tokenizer()
        with torch.random.fork_rng(devices=[]):  # the constructors draw weights from the global generator
            module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        sites.check(module)
        _randomise(module, sites, torch.Generator().manual_seed(seed_for("tiny", self.architecture, self.seed)))
        module = frozen(module)
        fingerprint = fingerprint_of(module, tokenizer)
        module.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides its signature
        return LanguageModel(module=module, tokenizer=tokenizer, sites=sites, description=self.describe(), fingerprint=fingerprint)

    def fingerprint(self) -> str:
        """Return the content hash of weights and tokenizer, made once for these settings."""
        fingerprint: str = Cache(Path(self.cache_dir)).json("fingerprints", self._fingerprint_key(), lambda: self.load().fingerprint)
        return fingerprint

    def known_fingerprint(self) -> str | None:
        """Return the content hash where the cache has it."""
        path = Cache(Path(self.cache_dir)).path("fingerprints", self._fingerprint_key(), ".json")
        return str(json.loads(path.read_text())) if path.exists() else None

    def _fingerprint_key(self) -> str:
        return content_key(
            {
                "config": self.config().to_diff_dict(),
                "seed": self.seed,
                "recipe": _RECIPE,
                "torch": torch.__version__,
                "python": sys.version,
            }
        )

    def config(self) -> PreTrainedConfig:
        """Return the architecture's config.

        Raises:
            ConfigError: transformers refuses it.
        """
        settings = _common(self) | _PARTICULARS[self.architecture](self) | dict(self.overrides)
        try:
            return AutoConfig.for_model(self.architecture, **settings)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(f"model {self.name}: transformers refuses this {self.architecture} config: {error}") from error

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer alone: trained in a moment on prose that ships with Python."""
        make = sentencepiece_like if self.architecture in _SENTENCEPIECE else byte_level
        return with_pad_token(make(vocab_size=self.vocab_size, max_length=self.max_positions), name=self.name)


def _common(model: TinyModel) -> dict[str, Any]:
    """Return what every config class takes (GPT-2's and GPT-J's map these names onto their own)."""
    start, end = (1, 2) if model.architecture in _SENTENCEPIECE else (0, 0)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.max_positions,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _gated(model: TinyModel) -> dict[str, Any]:
    return {"intermediate_size": 3 * model.hidden_size, "num_key_value_heads": max(1, model.num_heads // 2)}


def _gpt2(model: TinyModel) -> dict[str, Any]:  # noqa: ARG001
    return {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}  # as published: evaluation mode must switch them off


def _gptj(model: TinyModel) -> dict[str, Any]:
    return {"rotary_dim": model.hidden_size // model.num_heads // 2, "n_inner": 2 * model.hidden_size}


def _gpt_neox(model: TinyModel) -> dict[str, Any]:
    return {"intermediate_size": 4 * model.hidden_size, "use_parallel_residual": True}


def _mistral(model: TinyModel) -> dict[str, Any]:
    return _gated(model) | {"sliding_window": 64}


def _tied(model: TinyModel) -> dict[str, Any]:
    return _gated(model) | {"tie_word_embeddings": True, "head_dim": model.hidden_size // model.num_heads}


def _qwen3(model: TinyModel) -> dict[str, Any]:
    # Attention is wider than the stream, as in Qwen3-0.6B; an even number of dimensions is turned.
    return _tied(model) | {"head_dim": 3 * model.hidden_size // (4 * model.num_heads) * 2}


def _gemma2(model: TinyModel) -> dict[str, Any]:
    head_dim = model.hidden_size // model.num_heads
    return _tied(model) | {"query_pre_attn_scalar": head_dim, "sliding_window": 64}


_PARTICULARS: Mapping[str, Callable[[TinyModel], dict[str, Any]]] = MappingProxyType(
    {
        "gpt2": _gpt2,
        "gptj": _gptj,
        "gpt_neox": _gpt_neox,
        "llama": _gated,
        "mistral": _mistral,
        "qwen2": _gated,
        "qwen3": _qwen3,
        "gemma2": _gemma2,
        "olmo2": _gated,
        "phi3": _gated,
    }
)

_SENTENCEPIECE = frozenset({"llama", "mistral", "gemma2", "phi3"})


def _randomise(module: PreTrainedModel, sites: Sites, generator: torch.Generator) -> None:
    """Give every parameter of a module new values, in place.

    Maps keep the scale of their input (standard deviation 1 / sqrt(fan in)), vectors (biases, norms) move by 0.1 from where the class
    starts them, and the embedding and head are scaled so that logits spread by about two: neither flat nor certain.
    """
    embedding = module.get_submodule(sites.embedding)
    head = module.get_submodule(sites.head)
    # Where the head is the embedding, less of it: else every token predicts itself.
    spread = 1.6 if head.get_parameter("weight") is embedding.get_parameter("weight") else 2.0
    done: set[int] = set()
    for submodule in module.modules():
        for parameter in submodule.parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.data += 0.1 * noise
            elif submodule is embedding or submodule is head:
                parameter.data = spread * noise / parameter.shape[1] ** 0.5
            else:
                parameter.data = noise / _fan_in(submodule, parameter, transposed=sites.transposed) ** 0.5


def _fan_in(submodule: nn.Module, parameter: Tensor, *, transposed: bool) -> int:
    """Return the width of a map's input; a table of positions counts as a map from its width."""
    stores_input_first = transposed and not isinstance(submodule, (nn.Linear, nn.Embedding))
    return parameter.shape[0 if stores_input_first else 1]
