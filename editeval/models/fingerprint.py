"""The identity of a loaded model: a hash of everything that its numbers depend on."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editeval.models.model import end_ids, end_tokens
from editeval.types import ConfigError, content_key

# Says where a config came from or how it is run, not what the model computes.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "_attn_implementation",
        "architectures",
        "dtype",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def fingerprint_of(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 over config, tokenizer, what ends a text, and every stored tensor (name, dtype, shape, bytes) of a model as loaded.

    Equal on every machine, device and path for equal content; another dtype is another model. Tables that a model computes from its
    config at start (rotary frequencies) are left out: they may differ in the last bit between processors. So is the chat template:
    only what is asked in it depends on it, and has it in a key of its own.

    Raises:
        ConfigError: a tensor that was not loaded (offloaded for want of memory).
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in module.config.to_dict().items() if key not in _VOLATILE}
    digest.update(content_key(config).encode())
    digest.update(content_key([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]).encode())
    ends = end_tokens(module, tokenizer)
    if ends != end_ids(getattr(module.config, "eos_token_id", None), tokenizer):
        # Only where the generation config says something of its own: other models keep the name under which their statistics are stored.
        digest.update(content_key(sorted(ends)).encode())
    stored = module.state_dict()
    aliases = {id(parameter): name for name, parameter in sorted(module.named_parameters(remove_duplicate=False), reverse=True)}
    tied = {name for name, parameter in module.named_parameters(remove_duplicate=False) if aliases[id(parameter)] != name}
    for name in sorted(stored):
        if name in tied:
            continue
        tensor = stored[name]
        if tensor.is_meta:
            raise ConfigError(
                f"{name} was not loaded: the model does not fit in memory, and offloaded weights cannot be edited; "
                "use model.dtype=bfloat16, more devices with model.device_map=auto, or a smaller model"
            )
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
