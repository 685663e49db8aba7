from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from editeval.inference.encoding import TokenPair, answer_after, encode_answers, encode_pairs, encode_texts, fit, prefix_token, windows
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import EditevalError
from tests.benchmarks.conftest import smollm2_folder
from tests.inference.conftest import Load


@pytest.fixture(scope="module")
def llama(load_tiny: Load) -> LanguageModel:
    return load_tiny("llama")


def test_white_space_before_the_border_belongs_to_the_continuation(llama: LanguageModel) -> None:
    spaced = encode_pairs(llama.tokenizer, ["the town \n"], ["is"], special_tokens=None)
    joined = encode_pairs(llama.tokenizer, ["the town"], [" \nis"], special_tokens=None)
    assert [(pair.context, pair.continuation) for pair in spaced] == [(pair.context, pair.continuation) for pair in joined]


@pytest.mark.parametrize("kind", ["gpt2", "smollm2"])  # the tiny tokenizer of Llama's kind merges line breaks with what stands around them
def test_a_pair_knows_where_the_context_of_its_request_ends(kind: str, cache_dir: Path) -> None:
    tokenizer = tokenizer_of(kind, cache_dir)
    contexts = ["Who wrote it?", "[user]Who\n[assistant]\n", "\n"]
    pairs = encode_pairs(tokenizer, contexts, [" She", "She", "She"], special_tokens=None)
    for context, pair in zip(contexts[:2], pairs[:2], strict=True):
        assert pair.prompt_tokens == len(encode_texts(tokenizer, [context], special_tokens=None)[0])
    assert [len(pair.context) for pair in pairs] == [pairs[0].prompt_tokens, pairs[1].prompt_tokens - 1, 1]
    (nothing,) = encode_pairs(tokenizer, ["the town\n"], [""], special_tokens=None)
    assert nothing.blanks < len(nothing.continuation)


RAW_PROMPTS = ("The capital of France is", "Who wrote Émile?", "In 1998,", "a (so", "", "1 + 1 =")
ANSWERS = (" the", " New Zealand", " 19", " Émile", ' "x"')


def tokenizer_of(kind: str, cache_dir: Path) -> PreTrainedTokenizerFast:
    if kind != "smollm2":
        return TinyModel(name="tiny", architecture=kind, cache_dir=cache_dir).tokenizer()
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(smollm2_folder())
    return loaded


@pytest.mark.parametrize("kind", ["gpt2", "llama", "smollm2"])
def test_answers_to_prompts_without_white_space_at_the_end_have_the_tokens_of_the_harness(kind: str, cache_dir: Path) -> None:
    tokenizer = tokenizer_of(kind, cache_dir)
    prompts, answers = zip(*itertools.product(RAW_PROMPTS, ANSWERS), strict=True)
    assert encode_answers(tokenizer, prompts, answers, special_tokens=None) == encode_pairs(
        tokenizer, prompts, answers, special_tokens=None
    )


@pytest.mark.parametrize("ending", ["\n", "\n\n", " ", " \n"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "smollm2"])
def test_an_answer_is_scored_after_the_very_tokens_that_generation_reads(kind: str, ending: str, cache_dir: Path) -> None:
    tokenizer = tokenizer_of(kind, cache_dir)
    prompt = f"[user]The capital of France is\n[assistant]{ending}"
    (pair,) = encode_answers(tokenizer, [prompt], [answer_after(prompt, "the")], special_tokens=None)
    assert pair.context == encode_texts(tokenizer, [prompt], special_tokens=None)[0]
    assert tokenizer.decode(pair.continuation).strip(" ") == "the"
    assert len(pair.continuation) == len(tokenizer("the", add_special_tokens=False)["input_ids"])


def test_an_answer_of_white_space_alone_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(EditevalError, match=r"no token of its own after 'the town\\n'"):
        encode_answers(llama.tokenizer, ["the town\n"], [""], special_tokens=None)


def test_pair_is_the_whole_text_cut_after_the_context(llama: LanguageModel) -> None:
    (pair,) = encode_pairs(llama.tokenizer, ["the town"], [" of Rome"], special_tokens=None)
    assert (*pair.context, *pair.continuation) == encode_texts(llama.tokenizer, ["the town of Rome"], special_tokens=None)[0]
    assert pair.context == encode_texts(llama.tokenizer, ["the town"], special_tokens=None)[0]


def test_default_adds_the_beginning_of_sequence_once(llama: LanguageModel) -> None:
    bos = llama.tokenizer.bos_token_id
    default, given_twice, without = (
        encode_texts(llama.tokenizer, [text], special_tokens=special)[0]
        for text, special in (("Rome", None), (f"{llama.tokenizer.bos_token}Rome", None), ("Rome", False))
    )
    assert default.count(bos) == 1
    assert given_twice.count(bos) == 1
    assert bos not in without


def test_empty_context_is_one_prefix_token(llama: LanguageModel) -> None:
    pairs = encode_pairs(llama.tokenizer, ["", " "], ["Rome", "Rome"], special_tokens=None)
    assert [pair.context for pair in pairs] == [(prefix_token(llama.tokenizer),)] * 2


def test_continuation_that_merges_into_its_context_is_an_error(llama: LanguageModel) -> None:
    with pytest.raises(EditevalError, match="no token of its own"):
        encode_pairs(llama.tokenizer, ["the town"], [""], special_tokens=None)


def test_unequal_numbers_are_an_error(llama: LanguageModel) -> None:
    with pytest.raises(ValueError, match="2 contexts and 1 continuations"):
        encode_pairs(llama.tokenizer, ["a", "b"], ["c"], special_tokens=None)


def test_long_context_loses_tokens_on_the_left_and_the_input_fills_the_model() -> None:
    pair = fit(TokenPair(context=tuple(range(20)), continuation=(97, 98, 99)), max_length=8)
    assert pair.context == tuple(range(14, 20))
    assert len(pair.context) + len(pair.continuation) - 1 == 8


def test_continuation_longer_than_the_model_is_an_error() -> None:
    with pytest.raises(EditevalError, match="9 tokens does not fit the model's 8 positions"):
        fit(TokenPair(context=(1,), continuation=tuple(range(9))), max_length=8)


@given(length=st.integers(0, 60), max_length=st.integers(1, 17))
def test_windows_score_each_token_once_and_fit_the_model(length: int, max_length: int) -> None:
    tokens = list(range(1, length + 1))
    pairs = windows(tokens, prefix=(0,), max_length=max_length)
    assert [token for pair in pairs for token in pair.continuation] == tokens
    for pair in pairs:
        whole = [*pair.context, *pair.continuation]
        assert len(pair.context) >= 1
        assert len(whole) - 1 <= max_length
        assert whole == list(range(whole[0], whole[0] + len(whole)))
    if length > max_length:
        assert len(pairs[-1].context) + len(pairs[-1].continuation) - 1 == max_length
