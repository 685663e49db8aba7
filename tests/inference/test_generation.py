from __future__ import annotations

import functools
from typing import Any

import pytest

from editeval.inference.edited import EditedModel
from editeval.inference.generation import cut_at_stop, end_tokens
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.types import EditevalError
from tests.inference.conftest import Load

CONTEXTS = (
    "The capital of France is",
    "Who wrote the book? It was",
    "A",
    "A long way to the town of the river and the sea, " * 3 + "and then",
    "The capital of France is",
)


def transformers_texts(lm: LanguageModel, contexts: tuple[str, ...], max_new_tokens: int) -> list[str]:
    """What transformers' own generate says, one context at a time."""
    texts = []
    for context in contexts:
        encoded = lm.tokenizer(context, return_tensors="pt")
        output: Any = lm.module.generate(  # type: ignore[operator]
            input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, do_sample=False, max_new_tokens=max_new_tokens
        )
        texts.append(str(lm.tokenizer.decode(output[0, encoded.input_ids.shape[1] :], skip_special_tokens=True)))
    return texts


@pytest.mark.parametrize("architecture", SITES)
def test_texts_equal_those_of_transformers_one_by_one(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture)
    expected = transformers_texts(lm, CONTEXTS, 32)
    assert EditedModel(lm).generate(CONTEXTS, max_new_tokens=32) == expected
    assert EditedModel(lm, batch_tokens=1).generate(CONTEXTS, max_new_tokens=32) == expected


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_decoding_far_beyond_the_sliding_window_equals_transformers(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture, sliding_window=8)
    assert EditedModel(lm).generate(CONTEXTS, max_new_tokens=24) == transformers_texts(lm, CONTEXTS, 24)


def test_finished_rows_leave_the_batch(load_tiny: Load, monkeypatch: Any) -> None:
    lm = load_tiny("gpt2")
    texts = EditedModel(lm).generate(CONTEXTS, max_new_tokens=12)
    # Each row ends at another step: after one of its own characters that it has not shown before.
    stop = [text[3:6] for text in texts[:3]]
    sizes: list[int] = []
    plain_forward = type(lm.module).forward

    @functools.wraps(plain_forward)  # the engine reads the signature
    def forward(self: Any, **options: Any) -> Any:
        sizes.append(options["input_ids"].shape[0])
        return plain_forward(self, **options)

    monkeypatch.setattr(type(lm.module), "forward", forward)
    assert EditedModel(lm).generate(CONTEXTS, max_new_tokens=12, stop=stop) == [cut_at_stop(text, stop) for text in texts]
    assert sizes[0] == 4  # equal contexts are decoded once
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 4


def test_stop_string_is_found_across_token_borders(load_tiny: Load) -> None:
    lm = load_tiny("llama")
    model = EditedModel(lm)
    (text,) = model.generate(["The capital of France is"], max_new_tokens=20)
    # Every string of the text is found, wherever the borders of its tokens are.
    for start in range(1, len(text) - 3):
        stop = text[start : start + 3]
        (cut,) = model.generate(["The capital of France is"], max_new_tokens=20, stop=[stop])
        assert cut == text[: text.index(stop)]


def test_earliest_of_several_stop_strings_cuts() -> None:
    assert cut_at_stop("one two three", ["three", "two", ""]) == "one "
    assert cut_at_stop("one two three", ["four"]) == "one two three"


def test_end_of_sequence_of_model_and_tokenizer_end_a_text(load_tiny: Load) -> None:
    lm = load_tiny("gpt2")
    model = EditedModel(lm)
    first_tokens = lm.tokenizer.encode(model.generate(["The town"], max_new_tokens=8)[0])
    lm.module.generation_config.eos_token_id = [first_tokens[2], 999]
    assert end_tokens(lm.module, lm.tokenizer) == {first_tokens[2], 999, lm.tokenizer.eos_token_id}
    assert model.generate(["The town"], max_new_tokens=8) == transformers_texts(lm, ("The town",), 8)
    assert len(model.generate(["The town"], max_new_tokens=8)[0]) < len(lm.tokenizer.decode(first_tokens))


def test_context_that_is_too_long_is_cut_on_the_left(load_tiny: Load) -> None:
    lm = load_tiny("gpt2", max_positions=32)
    context = "the town and the river " * 20
    shortened = str(lm.tokenizer.decode(lm.tokenizer.encode(context)[-24:]))
    assert EditedModel(lm).generate([context], max_new_tokens=8) == EditedModel(lm).generate([shortened], max_new_tokens=8)


def test_no_room_for_a_context_is_an_error(load_tiny: Load) -> None:
    with pytest.raises(EditevalError, match="at most 31 are possible"):
        EditedModel(load_tiny("gpt2", max_positions=32)).generate(["a"], max_new_tokens=32)


def test_impossible_arguments_are_errors(load_tiny: Load) -> None:
    model = EditedModel(load_tiny("gpt2"))
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match="a list of strings"):
        model.generate(["a"], max_new_tokens=1, stop="\n")


def test_empty_context_starts_from_the_prefix_token(load_tiny: Load) -> None:
    lm = load_tiny("gpt2")
    assert EditedModel(lm).generate([""], max_new_tokens=8) == EditedModel(lm).generate([lm.tokenizer.bos_token], max_new_tokens=8)
