"""Where a subject ends and a target begins, for byte-level and SentencePiece-like tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from editeval.keyvalue.lookup import Located, leading_special_ids, locate, locate_request
from editeval.models.tiny import TinyModel
from editeval.types import EditError, EditRequest

ARCHITECTURES = ("gpt2", "llama")  # byte-level without BOS; SentencePiece-like with BOS


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tokenizer(request: pytest.FixtureRequest, cache_dir: Path) -> PreTrainedTokenizerFast:
    return TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir).tokenizer()


def text_up_to_subject(tokenizer: PreTrainedTokenizerFast, located: Located) -> str:
    return str(tokenizer.decode(located.token_ids[: located.subject_last + 1], skip_special_tokens=True))


def target_text(tokenizer: PreTrainedTokenizerFast, located: Located) -> str:
    return str(tokenizer.decode(located.target_ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    ("template", "subject", "expected"),
    [
        ("The mother tongue of {} is", "Danielle Darrieux", "The mother tongue of Danielle Darrieux"),
        ("{} is the capital of", "Port Moresby", "Port Moresby"),
        ("They all came from {}", "Nokia", "They all came from Nokia"),
        ("{}'s domain of activity is", "John Henry Poynting", "John Henry Poynting"),
        ("In {}, the language spoken is", "Nykarleby", "In Nykarleby"),
        ("The author of {} is", "Les Misérables — tome Ⅱ", "The author of Les Misérables — tome Ⅱ"),
    ],
)
@pytest.mark.parametrize("context", ["{}", "Yesterday it rained. {}", "I-th integer,. {}"])
def test_the_position_found_is_that_of_the_subjects_last_token(
    tokenizer: PreTrainedTokenizerFast, template: str, subject: str, expected: str, context: str
) -> None:
    located = locate(tokenizer, template, subject, target="English", context=context)
    assert text_up_to_subject(tokenizer, located).strip() == context.replace("{}", expected).strip()


def test_white_space_at_the_end_of_a_subject_is_not_its_last_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert text_up_to_subject(tokenizer, locate(tokenizer, "The song {} is", "Yellow ")).endswith("Yellow")


@pytest.mark.parametrize("template", ["The capital of {} is", "The capital of {} is ", "The capital of {} is  "])
@pytest.mark.parametrize("target", ["Rome", " Rome", "Rome "])
def test_a_target_is_joined_with_exactly_one_blank(tokenizer: PreTrainedTokenizerFast, template: str, target: str) -> None:
    located = locate(tokenizer, template, "Italy", target=target)
    plain = tokenizer("The capital of Italy is Rome")["input_ids"]
    assert list(located.token_ids) == plain
    assert target_text(tokenizer, located) == "Rome"


def test_each_token_of_the_target_is_predicted_one_position_before_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    located = locate(tokenizer, "{} plays for the team of", "Roberto Clemente", target="University of Michigan")
    assert len(located.target_ids) > 1
    assert located.input_ids == located.token_ids[:-1]
    assert [located.token_ids[position + 1] for position in located.scored_positions] == list(located.target_ids)


def test_a_subject_with_braces_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    located = locate(tokenizer, "The set {} is", "{a}", target="finite", context="So. {}")
    assert "{a}" in text_up_to_subject(tokenizer, located).replace(" ", "")


def test_a_subject_that_stands_twice_is_found_where_the_template_says(tokenizer: PreTrainedTokenizerFast) -> None:
    located = locate(tokenizer, "Paris, unlike Paris in Texas and {} in Maine, is", "Paris", target="old")
    assert text_up_to_subject(tokenizer, located).count("Paris") == 3


def test_a_beginning_token_stands_once_before_the_prompt(cache_dir: Path) -> None:
    tokenizer = TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).tokenizer()
    assert leading_special_ids(tokenizer) == (tokenizer.bos_token_id,)
    located = locate(tokenizer, "{} is", "Rome", target="old", context="Therefore. {}")
    assert located.token_ids[0] == tokenizer.bos_token_id
    assert located.token_ids.count(tokenizer.bos_token_id) == 1


def test_a_target_that_changes_the_subjects_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models

    # Without a pre-tokenizer a merge can reach over the blank: "a b" is one token, "a" is another.
    vocabulary = {"a": 0, "b": 1, " ": 2, " b": 3, "a b": 4, "x": 5}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[(" ", "b"), ("a", " b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    with pytest.raises(EditError, match=r"change when target 'b' follows.*\[request q\]"):
        locate(tokenizer, "x{}", "a", target="b", request_id="q")


def test_a_prompt_longer_than_the_model_takes_is_refused_with_its_id(tokenizer: PreTrainedTokenizerFast) -> None:
    request = EditRequest(request_id="r1", prompt="{} is", subject="Rome", target_new="old")
    with pytest.raises(EditError, match=r"at most 3.*\[request r1\]"):
        locate_request(tokenizer, request, ["{}", "A long context. {}"], max_tokens=3)


@pytest.mark.parametrize("context", ["no placeholder", "{} and {}"])
def test_a_context_without_exactly_one_placeholder_is_refused(tokenizer: PreTrainedTokenizerFast, context: str) -> None:
    with pytest.raises(EditError, match="exactly one"):
        locate(tokenizer, "{} is", "Rome", context=context)
