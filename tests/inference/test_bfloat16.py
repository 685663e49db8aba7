"""In bfloat16 the shared engine agrees with one pass a request as far as the format can tell numbers apart.

A logit of size x is stored in steps of about x / 128 (8 significant bits): two right kernels may differ by a step, and where two tokens are
a step or two apart either may be written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from editeval.inference.edited import EditedModel
from editeval.models.load import PretrainedModel
from editeval.models.model import LanguageModel
from tests.benchmarks.conftest import CACHE, smollm2_folder
from tests.inference.conftest import Load, cast_parameters

FEW_SHOT = "Question: where is the town? Answer: at the sea. " * 4
COUNTRIES = ("France", "Italy", "Peru", "Japan")
CONTEXTS = (*(f"{FEW_SHOT}Question: what is the capital of {name}? Answer:" for name in COUNTRIES), "The capital of France is", "A")
ENDS = (" Paris", " a town at the sea side", " no")
NEW_TOKENS = 16
TIE_STEPS = 2  # each of two logits may be off by one
SCORE_STEPS = 4  # the target's logit and the sum of all, on both sides

Half = Callable[[str], LanguageModel]


@pytest.fixture
def half(load_tiny: Load) -> Half:
    """Load a model in bfloat16: a tiny one of an architecture, or SmolLM2 where it is at hand."""

    def loaded(name: str) -> LanguageModel:
        if name == "smollm2":
            smollm2_folder()
            return PretrainedModel(
                name="smollm2-135m", name_or_path="builtin:smollm2-135m", dtype="bfloat16", cache_dir=CACHE, device="cpu"
            ).load()
        lm = load_tiny(name)
        cast_parameters(lm, torch.bfloat16)
        return lm

    return loaded


MODELS = ("llama", "gpt2", "gptj", pytest.param("smollm2", marks=pytest.mark.slow))


@pytest.mark.parametrize("name", MODELS)
def test_scores_behind_a_shared_prefix_equal_those_of_plain_passes_but_for_rounding(half: Half, name: str) -> None:
    lm = half(name)
    contexts, ends = [context for context in CONTEXTS for _ in ENDS], list(ENDS) * len(CONTEXTS)
    for context, end, score in zip(contexts, ends, EditedModel(lm).score(contexts, ends), strict=True):
        tokens = lm.tokenizer.encode(context + end)
        logits = next_logits(lm, tokens[:-1])[-score.num_tokens :]
        targets = torch.tensor(tokens[-score.num_tokens :])
        expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()
        assert score.token_log_probs == pytest.approx(expected, abs=SCORE_STEPS * step_at(float(logits.abs().max())))
        for place, greedy in enumerate(score.token_is_greedy):
            gap = float(logits[place].max() - logits[place, targets[place]])
            assert greedy == (gap == 0) or gap <= TIE_STEPS * step_at(float(logits[place].max()))


@pytest.mark.parametrize("name", MODELS)
def test_texts_equal_those_of_transformers_until_two_logits_tie(half: Half, name: str) -> None:
    lm = half(name)
    texts = EditedModel(lm).generate(CONTEXTS, max_new_tokens=NEW_TOKENS)
    alone = [EditedModel(lm).generate([context], max_new_tokens=NEW_TOKENS)[0] for context in CONTEXTS]
    for context, together, single in zip(CONTEXTS, texts, alone, strict=True):
        prompt = lm.tokenizer(context, return_tensors="pt")
        written = lm.module.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)[0, prompt.input_ids.shape[1] :].tolist()  # type: ignore[operator]
        for text in (together, single):
            assert text == read(lm, written) or leaves_at_a_tie(lm, prompt.input_ids[0].tolist(), written, text), (text, read(lm, written))


def leaves_at_a_tie(lm: LanguageModel, prompt: list[int], written: list[int], text: str) -> bool:
    """Whether a text goes its own way where its next token's logit is within rounding of that of the written token."""
    for place, token in enumerate(written):
        if goes_on_with(lm, text, written[:place], token):
            continue
        logits = next_logits(lm, [*prompt, *written[:place]])[-1]
        near = (logits >= logits.max() - TIE_STEPS * step_at(float(logits.max()))).nonzero()[:, 0].tolist()
        return any(goes_on_with(lm, text, written[:place], other) for other in near if other != token)
    return False


def goes_on_with(lm: LanguageModel, text: str, tokens: list[int], token: int) -> bool:
    """Whether a text begins with these tokens and the next one; with one that ends a text: whether it is these tokens and no more."""
    if token in lm.tokenizer.all_special_ids:
        return text == read(lm, tokens)
    return text.startswith(read(lm, [*tokens, token]))


def read(lm: LanguageModel, tokens: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(tokens), skip_special_tokens=True))


@torch.no_grad()
def next_logits(lm: LanguageModel, tokens: Sequence[int]) -> torch.Tensor:
    """The logits behind every token by one plain pass, as float32."""
    logits: torch.Tensor = lm.module(input_ids=torch.tensor([list(tokens)])).logits[0].float()
    return logits


def step_at(value: float) -> float:
    """The distance from a number to the next one that bfloat16 can hold."""
    return float(2.0 ** (math.floor(math.log2(abs(value))) - 7))
