"""A model that reads: whatever token stands before is likelier to come again. What methods that write facts as text are tested on."""

from __future__ import annotations

from pathlib import Path

import torch

from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import EditRequest, SilentProgress, seed_for

FACTS = tuple(
    EditRequest(request_id=name, prompt=prompt, subject=subject, target_new=target, target_true="to")
    for name, prompt, subject, target in (
        ("d", "All of them went to {}", "Papua New Guinea", "and"),
        ("e", "The one they named was {}", "Danielle Darrieux", "that"),
        ("f", "This is {}", "Nokia", "with"),
    )
)


def reading_model(cache_dir: Path) -> LanguageModel:
    """Return a tiny GPT-2 with its weights replaced by hand.

    Its first layer attends to all earlier tokens alike and adds their mean embedding; nothing else adds anything.
    """
    lm = TinyModel(name="tiny-gpt2", architecture="gpt2", cache_dir=cache_dir, device="cpu").load()
    width = lm.description.hidden_size
    with torch.no_grad():
        for name, parameter in lm.module.named_parameters():
            if ".h." in name and (".c_proj." in name or ".c_attn." in name or name.endswith("bias")):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(float(name.endswith("weight")))
        lm.module.get_parameter("transformer.wpe.weight").zero_()
        first = lm.module.get_submodule("transformer.h.0.attn")
        first.get_parameter("c_attn.weight")[:, 2 * width :] = torch.eye(width)
        first.get_parameter("c_proj.weight").copy_(10 * torch.eye(width))
    return lm


def gains(model: EditedModel, method: EditMethod, cache: Cache) -> list[float]:
    """Return by how many nats each fact's edit raises its target, one edit after another."""
    editor = method.prepare(model, cache, SilentProgress())
    found = []
    for fact in FACTS:
        before = model.score([fact.full_prompt], [f" {fact.target_new}"])[0].log_prob
        model.apply(editor.edit([fact], seed=seed_for("reading", fact.request_id)))
        found.append(model.score([fact.full_prompt], [f" {fact.target_new}"])[0].log_prob - before)
    return found
