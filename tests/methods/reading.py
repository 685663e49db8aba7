"""A model that reads: whatever token stands before is likelier to come again. What methods that write facts as text are tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """Where the first layer's attention reads (rows or columns of a map that are the values') and writes."""

    values: str
    out: str
    rows: Callable[[int, int], list[int]]


ATTENTION = {
    "gpt2": _Attention(values="attn.c_attn", out="attn.c_proj", rows=lambda width, _: list(range(2 * width, 3 * width))),
    "gpt_neox": _Attention(  # of each head the query, the key and the value, one after another
        values="attention.query_key_value",
        out="attention.dense",
        rows=lambda width, head: [start + 2 * head + row for start in range(0, 3 * width, 3 * head) for row in range(head)],
    ),
    "llama": _Attention(values="self_attn.v_proj", out="self_attn.o_proj", rows=lambda width, _: list(range(width))),
}


def reading_model(cache_dir: Path, architecture: str = "gpt2") -> LanguageModel:
    """Return a tiny model with its weights replaced by hand.

    Its first layer attends to all earlier tokens alike and adds their mean embedding; nothing else adds anything.
    """
    whole = {"num_key_value_heads": 4} if architecture == "llama" else {}
    lm = TinyModel(
        name=f"tiny-{architecture}", architecture=architecture, cache_dir=cache_dir, device="cpu", num_heads=4, overrides=whole
    ).load()
    width, sites = lm.description.hidden_size, lm.sites
    attention = ATTENTION[architecture]
    with torch.no_grad():
        embedding, head = (lm.module.get_submodule(path).get_parameter("weight") for path in (sites.embedding, sites.head))
        head.copy_(embedding)
        for name, parameter in lm.module.named_parameters():
            if parameter is embedding or parameter is head:
                continue
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.fill_(float(is_scale))
        first = lm.layer_module(sites.layers, 0)
        values, out = (first.get_submodule(path).get_parameter("weight") for path in (attention.values, attention.out))
        rows = torch.tensor(attention.rows(width, width // 4))
        (values.T if sites.transposed else values)[rows] = torch.eye(width)
        out.copy_(10 * torch.eye(width))
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
