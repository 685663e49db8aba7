"""Early stops: loops are found where they are, texts stay what they would have been, fewer steps are taken."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editeval.inference.edited import EditedModel
from editeval.inference.endings import LONGEST_PERIOD, SHORTEST_LOOP, EarlyStops, continued, loop_period
from editeval.types import ConfigError
from tests.inference.conftest import Load
from tests.inference.test_generation import passes_of

CONTEXTS = ("The capital of France is", "Who wrote the book? It was", "A", "One two three four five six seven")
LIVE_AND_PADDED = ("llama", "gptj")  # with our attention, and with the model's own

TOKENS = st.lists(st.integers(0, 3), max_size=40)
PERIODS = st.lists(st.integers(0, 3), min_size=1, max_size=LONGEST_PERIOD)
REPEATS = st.integers(2, 6)


def is_loop(tokens: list[int], period: int, repeats: int) -> bool:
    """By the definition: token by token."""
    size = max(period * repeats, SHORTEST_LOOP)
    return len(tokens) >= size and all(tokens[-1 - place] == tokens[-1 - place - period] for place in range(size - period))


@given(TOKENS, PERIODS, st.integers(0, 40), REPEATS)
def test_a_loop_is_found_exactly_where_the_definition_has_one(start: list[int], period: list[int], times: int, repeats: int) -> None:
    tokens = start + period * times
    shortest = next((size for size in range(1, LONGEST_PERIOD + 1) if is_loop(tokens, size, repeats)), None)
    assert loop_period(tokens, repeats) == shortest


@given(TOKENS, PERIODS, REPEATS, st.integers(0, LONGEST_PERIOD))
def test_a_loop_is_found_as_soon_as_it_is_long_enough_wherever_it_is_cut(
    start: list[int], period: list[int], repeats: int, more: int
) -> None:
    looped = period * (repeats + SHORTEST_LOOP + 1)
    size = max(len(period) * repeats, SHORTEST_LOOP) + more
    assert loop_period(start + looped[:size], repeats) is not None


@given(TOKENS, PERIODS, REPEATS, st.integers(0, 200))
def test_what_is_written_on_is_what_the_loop_would_have_been(start: list[int], period: list[int], repeats: int, more: int) -> None:
    endless = start + period * 300
    seen = endless[: len(start) + max(len(period) * repeats, SHORTEST_LOOP)]
    found = loop_period(seen, repeats)
    assert found is not None
    assert continued(seen, found, len(seen) + more) == endless[: len(seen) + more]


@given(st.integers(0, 9), st.integers(2, SHORTEST_LOOP - 1))
def test_a_few_equal_tokens_in_a_row_are_no_loop(token: int, count: int) -> None:
    assert loop_period([10, 11, *[token] * count], 2) is None


@pytest.mark.parametrize("architecture", LIVE_AND_PADDED)
def test_loops_cost_fewer_steps_and_their_texts_stay(load_tiny: Load, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    lm = load_tiny(architecture)
    model = EditedModel(lm)
    model.score(["a"], [" b"])  # the plan's trial is over
    # Without attention a token decides the next one: every text is a loop sooner or later, and none is ever left.
    for name, parameter in lm.module.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight")):
            parameter.data.zero_()
    plain = model.generate(CONTEXTS, max_new_tokens=200)
    shapes = passes_of(lm, monkeypatch)
    assert model.generate(CONTEXTS, max_new_tokens=200, early=EarlyStops(loop_repeats=4)) == plain
    assert decoded(shapes) < 4 * 150  # of 4 * 199


@pytest.mark.parametrize("architecture", LIVE_AND_PADDED)
def test_a_text_ends_behind_its_answer(load_tiny: Load, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    lm = load_tiny(architecture)
    model = EditedModel(lm)
    plain = model.generate(CONTEXTS, max_new_tokens=60)
    answers = [text[10:14] for text in plain]
    pattern = "|".join(re.escape(answer) for answer in answers)
    shapes = passes_of(lm, monkeypatch)
    texts = model.generate(CONTEXTS, max_new_tokens=60, early=EarlyStops(answer_pattern=pattern))
    for text, whole in zip(texts, plain, strict=True):
        assert whole.startswith(text)
        assert text == whole[: min(whole.find(answer) + len(answer) for answer in answers if answer in whole)]
    assert decoded(shapes) < 4 * 30


@pytest.mark.parametrize("architecture", LIVE_AND_PADDED)
def test_off_is_what_it_was(load_tiny: Load, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    lm = load_tiny(architecture)
    model = EditedModel(lm)
    plain = model.generate(CONTEXTS, max_new_tokens=100)
    shapes = passes_of(lm, monkeypatch)
    assert model.generate(CONTEXTS, max_new_tokens=100, early=EarlyStops()) == plain
    assert decoded(shapes) == 4 * 99


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loop_repeats": 1}, "loop_repeats=1 must be a whole number of at least 2"),
        ({"loop_repeats": True}, "loop_repeats=True must be"),
        ({"loop_repeats": 2.5}, "loop_repeats=2.5 must be"),
        ({"answer_pattern": "(a"}, r"answer_pattern='\(a' is no regular expression: missing \)"),
        ({"answer_pattern": 3}, "answer_pattern=3 is no regular expression"),
        ({"answer_pattern": "x*"}, r"answer_pattern='x\*' matches an empty text"),
    ],
)
def test_impossible_early_stops_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EarlyStops(**settings)


def decoded(shapes: list[tuple[int, int]]) -> int:
    """The tokens of all passes that decode one token a row."""
    return sum(rows for rows, width in shapes if width == 1)
