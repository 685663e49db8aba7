"""A loaded model: module, tokenizer and sites under one roof."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.models.sites import Sites
from editeval.types import ModelDescription


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A causal language model as loaded: never changed by anyone but `inference.EditedModel`.

    `fingerprint` is the content hash of its weights as loaded (dtype included) and of its tokenizer.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sites: Sites
    description: ModelDescription
    fingerprint: str

    def layer_module(self, site: str, layer: int) -> nn.Module:
        """Return the module at a site path such as `sites.mlp_out` in layer `layer`."""
        return self.module.get_submodule(site.format(layer))

    def device_of(self, module: nn.Module) -> torch.device:
        """Return the device of a module's first parameter: operations follow the owning parameter."""
        return next(module.parameters()).device
