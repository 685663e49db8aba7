from __future__ import annotations

import functools
import random
from typing import Any

import pytest

from editeval.inference import live
from editeval.inference.edited import EditedModel
from editeval.inference.endings import Live, cut_at_stop
from editeval.models.model import LanguageModel, end_tokens
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


FEW_SHOT = "Question: where is the town? Answer: at the sea. " * 4


@pytest.mark.parametrize("architecture", SITES)
def test_texts_behind_a_shared_beginning_equal_those_of_transformers(load_tiny: Load, architecture: str) -> None:
    lm = load_tiny(architecture)
    contexts = (*(f"{FEW_SHOT}Question: {'who ' * number}went to the river?" for number in range(9)), FEW_SHOT.rstrip(), *CONTEXTS)
    expected = transformers_texts(lm, contexts, 12)
    for batch_tokens in (4096, 24):
        assert EditedModel(lm, batch_tokens=batch_tokens).generate(contexts, max_new_tokens=12) == expected
    order = random.Random(0).sample(range(len(contexts)), len(contexts))
    shuffled = EditedModel(lm).generate([contexts[number] for number in order], max_new_tokens=12)
    assert shuffled == [expected[number] for number in order]


def test_shared_beginning_is_read_once_and_slots_are_filled_again(load_tiny: Load, monkeypatch: Any) -> None:
    lm = load_tiny("gpt2")
    contexts = [f"{FEW_SHOT}Question: {number}?" for number in range(12)]
    texts = EditedModel(lm).generate(contexts, max_new_tokens=10)
    stop = [texts[0][4:12], texts[5][7:15]]
    monkeypatch.setattr(live, "MAX_LIVE", 3)
    shapes = passes_of(lm, monkeypatch)
    assert EditedModel(lm).generate(contexts, max_new_tokens=10, stop=stop) == [cut_at_stop(text, stop) for text in texts]
    read = [width for rows, width in shapes if rows == 1 and width > 8]
    assert len(lm.tokenizer.encode(contexts[0])) < read[-1] < 2 * len(lm.tokenizer.encode(contexts[0]))
    assert max(rows for rows, _ in shapes) == 3


def test_groups_do_not_depend_on_the_order_of_contexts() -> None:
    first, second = tuple(range(100)), tuple(range(200, 280))
    contexts = [(*first, 1, 2), (*second, 5), (7, 8), (*first, 3), (*second, 6), (*first[:20], 9), (7,)]
    for order in (contexts, contexts[::-1]):
        groups = live.groups_of([Live(context=context) for context in order], None)
        found = {(group.shared, tuple(sorted(row.context for row in group.rows))) for group in groups}
        assert found == {
            (100, ((*first, 1, 2), (*first, 3))),
            (80, ((*second, 5), (*second, 6))),
            (0, ((*first[:20], 9), (7,), (7, 8))),
        }


def passes_of(lm: LanguageModel, monkeypatch: Any) -> list[tuple[int, int]]:
    """The list that will hold the shape (rows, tokens) of every pass through the model."""
    shapes: list[tuple[int, int]] = []
    plain_forward = type(lm.module).forward

    @functools.wraps(plain_forward)  # the engine reads the signature
    def forward(self: Any, **options: Any) -> Any:
        shapes.append(tuple(options["input_ids"].shape))
        return plain_forward(self, **options)

    monkeypatch.setattr(type(lm.module), "forward", forward)
    return shapes


@pytest.mark.parametrize("architecture", ["gpt2", "gptj"])  # with our attention, and with its own
def test_finished_rows_leave_the_batch(load_tiny: Load, monkeypatch: Any, architecture: str) -> None:
    lm = load_tiny(architecture)
    texts = EditedModel(lm).generate(CONTEXTS, max_new_tokens=12)
    # Each row ends at another step: after one of its own characters that it has not shown before.
    stop = [text[3:6] for text in texts[:3]]
    model = EditedModel(lm)
    model.score(["a"], [" b"])  # the plan's trial is over
    shapes = passes_of(lm, monkeypatch)
    assert model.generate(CONTEXTS, max_new_tokens=12, stop=stop) == [cut_at_stop(text, stop) for text in texts]
    sizes = [rows for rows, width in shapes if width == 1]
    assert sizes[0] <= 4  # equal contexts are decoded once
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
