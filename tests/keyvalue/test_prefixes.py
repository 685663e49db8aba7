"""Generated context prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editeval.files import Cache
from editeval.keyvalue.lookup import leading_special_ids
from editeval.keyvalue.prefixes import OPENINGS, check_prefixes, context_prefixes
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError

LENGTHS = ((5, 10), (8, 5))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir).load()


def test_the_bare_prompt_comes_first_and_every_prefix_has_one_placeholder(lm: LanguageModel, tmp_path: Path) -> None:
    contexts = context_prefixes(lm, LENGTHS, seed=0, cache=Cache(tmp_path))
    assert contexts[0] == "{}"
    assert len(contexts) == 16
    check_prefixes(contexts)
    assert all(any(context.startswith(opening) for opening in OPENINGS) for context in contexts[1:])


def test_the_seed_alone_decides_and_no_global_random_state_moves(lm: LanguageModel, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first = context_prefixes(lm, LENGTHS, seed=0, cache=Cache(tmp_path / "a"))
    torch.manual_seed(7)
    assert context_prefixes(lm, LENGTHS, seed=0, cache=Cache(tmp_path / "b")) == first
    assert context_prefixes(lm, LENGTHS, seed=1, cache=Cache(tmp_path / "a")) != first
    torch.set_rng_state(before)
    context_prefixes(lm, LENGTHS, seed=2, cache=Cache(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_openings_of_different_lengths_is_as_likely_as_each_alone(lm: LanguageModel, tmp_path: Path) -> None:
    # Every sampled token is among the model's likeliest after the text before it, alone and unpadded.
    checked = 0
    for context in context_prefixes(lm, ((6, 5),), seed=3, cache=Cache(tmp_path))[1:]:
        text = context.removesuffix(". {}")
        ids = [*leading_special_ids(lm.tokenizer), *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
        if lm.tokenizer.decode(ids, skip_special_tokens=True) != text or len(ids) != 6 + len(leading_special_ids(lm.tokenizer)):
            continue  # the text was cut into other tokens than were sampled
        with torch.no_grad():
            logits = lm.module(input_ids=torch.tensor([ids])).logits[0]
        opening = max((len(lm.tokenizer(word)["input_ids"]) for word in OPENINGS if text.startswith(word)), default=1)
        checked += 1
        for position in range(opening, len(ids)):
            assert ids[position] in logits[position - 1].topk(12).indices.tolist()
    assert checked > 0


@pytest.mark.parametrize(
    ("contexts", "what"), [(["Yes. {}"], "first"), ([], "first"), (["{}", "none"], "exactly once"), (["{}", "{} {}"], "exactly once")]
)
def test_prefixes_that_cannot_work_are_refused(contexts: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_prefixes(contexts)
