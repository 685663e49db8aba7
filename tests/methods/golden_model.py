"""The tiny GPT-2 for which the golden numbers were computed, and how far numbers are from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from editeval.models.load import description_of, frozen
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden_model() -> LanguageModel:
    folder = GOLDEN / "tiny_gpt2"
    module = frozen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return LanguageModel(
        module=module,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        sites=sites_for("gpt2"),
        description=description_of("tiny-gpt2", module.config),
        fingerprint="golden tiny gpt2",
    )


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return float((ours - golden).norm() / golden.norm())
