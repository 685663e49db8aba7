"""A loaded model: module, tokenizer and sites under one roof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.models.packed import PackedWeights
from editeval.models.sites import Sites
from editeval.types import ModelDescription

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A causal language model as loaded: never changed by anyone but `inference.EditedModel`.

    `fingerprint` is the content hash of its weights as loaded (dtype included), of its tokenizer and of what ends its texts. `packed`
    holds copies of its matrices that multiply faster on a processor.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sites: Sites
    description: ModelDescription
    fingerprint: str
    packed: PackedWeights = field(default_factory=PackedWeights)

    def layer_module(self, site: str, layer: int) -> nn.Module:
        """Return the module at a site path such as `sites.mlp_out` in layer `layer`."""
        return self.module.get_submodule(site.format(layer))

    def device_at(self, path: str) -> torch.device:
        """Return the device of the first parameter of the module at a path: operations follow the owning parameter."""
        return next(self.module.get_submodule(path).parameters()).device

    @property
    def input_device(self) -> torch.device:
        """The device that token ids are put on."""
        return self.device_at(self.sites.embedding)

    def packed_products(self) -> AbstractContextManager[None]:
        """Within the context passes on a processor read float32 weights from packed copies (see `models.packed`), last layers first."""
        layers = [self.layer_module(self.sites.layers, index) for index in reversed(range(self.description.num_layers))]
        return self.packed.products([self.module.get_submodule(self.sites.head), *layers])


def end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the ids that end a text: the generation config's and the tokenizer's."""
    return end_ids(None if module.generation_config is None else module.generation_config.eos_token_id, tokenizer)


def end_ids(configured: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the ids that end a text by a config's `eos_token_id`, and the tokenizer's."""
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return frozenset(int(token_id) for token_id in ids)


def from_packed_weights(
    function: Callable[Concatenate[LanguageModel, Arguments], Result],
) -> Callable[Concatenate[LanguageModel, Arguments], Result]:
    """Let a function of a model run within the model's `packed_products`."""

    @wraps(function)
    def packed(lm: LanguageModel, /, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        with lm.packed_products():
            return function(lm, *arguments, **keywords)

    return packed
