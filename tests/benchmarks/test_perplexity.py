"""Perplexity of a text file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from editeval.benchmarks.perplexity import TOKENS_PER_SAMPLE, Perplexity
from editeval.inference.edited import ContinuationScore, EditedModel
from editeval.interfaces import Benchmark
from editeval.types import ConfigError, DatasetError
from tests.benchmarks.conftest import context_of, large_edit

TEXT = "Rain fell on the harbour all morning, and the gulls kept to the roofs. " * 12


class Uniform:
    """Every token of a text has the same probability."""

    def __init__(self, log_prob: float, tokens: int) -> None:
        self.log_probs = (log_prob,) * tokens

    def score_text(self, texts: list[str], **_: Any) -> list[ContinuationScore]:
        log_probs = self.log_probs
        score = ContinuationScore(log_prob=sum(log_probs), token_log_probs=log_probs, token_is_greedy=(False,) * len(log_probs))
        return [score] * len(texts)


def text_file(folder: Path, text: str = TEXT) -> str:
    path = folder / "harbour.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def values(benchmark: Perplexity, model: Any, folder: Path) -> dict[str, float]:
    return {found.metric: found.value for found in benchmark.evaluate(cast(EditedModel, model), context_of(folder)).measurements}


def test_uniform_model_over_v_words_has_perplexity_v(tmp_path: Path) -> None:
    benchmark = Perplexity(text_file=text_file(tmp_path), max_characters=None)
    found = values(benchmark, Uniform(-math.log(50), 100), tmp_path)
    assert found["perplexity"] == pytest.approx(50)
    assert found["bits_per_token"] == pytest.approx(math.log2(50))
    assert found["bits_per_byte"] == pytest.approx(100 * math.log2(50) / len(TEXT.encode()))


def test_every_number_says_that_lower_is_better_and_counts_tokens(tmp_path: Path) -> None:
    evaluation = Perplexity(text_file=text_file(tmp_path), max_characters=None).evaluate(
        cast(EditedModel, Uniform(-1.0, 150)), context_of(tmp_path)
    )
    assert {(found.task, found.higher_is_better, found.n) for found in evaluation.measurements} == {("harbour", False, 150)}
    assert [sample["tokens"] for sample in evaluation.samples] == [TOKENS_PER_SAMPLE, TOKENS_PER_SAMPLE, 150 - 2 * TOKENS_PER_SAMPLE]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_scored_are_the_tokens_of_the_text_without_a_start_token(
    architecture: str, tmp_path: Path, tiny: Callable[[str], EditedModel]
) -> None:
    model = tiny(architecture)
    found = Perplexity(text_file=text_file(tmp_path), max_characters=None).evaluate(model, context_of(tmp_path))
    assert {each.n for each in found.measurements} == {len(model.lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"])}


def test_collapsed_model_is_infinitely_perplexed_not_an_error(tmp_path: Path) -> None:
    found = values(Perplexity(text_file=text_file(tmp_path), max_characters=None), Uniform(-5000.0, 10), tmp_path)
    assert found["perplexity"] == math.inf
    assert math.isfinite(found["bits_per_token"])


def test_perplexity_moves_with_an_edit_and_back(tmp_path: Path, tiny: Callable[[str], EditedModel]) -> None:
    model, benchmark = tiny("gpt2"), Perplexity(text_file=text_file(tmp_path), max_characters=None)
    before = values(benchmark, model, tmp_path)
    model.apply(large_edit(model))
    assert values(benchmark, model, tmp_path) != before
    model.restore()
    assert values(benchmark, model, tmp_path) == before


def test_settings_follow_the_text_that_is_read_not_its_path(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    one = Perplexity(text_file=text_file(tmp_path), max_characters=None)
    two = Perplexity(text_file=text_file(tmp_path / "copy"), max_characters=None)
    assert one.settings() == two.settings()
    assert one.settings() != Perplexity(text_file=text_file(tmp_path), max_characters=30).settings()
    assert isinstance(one, Benchmark)


def test_missing_empty_and_undecodable_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot read the text /nowhere"):
        Perplexity(text_file="/nowhere", max_characters=None).check()
    with pytest.raises(DatasetError, match=r"harbour.txt is empty"):
        Perplexity(text_file=text_file(tmp_path, " \n"), max_characters=None).check()
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"set text_file to a UTF-8 file"):
        Perplexity(text_file=str(path), max_characters=None).check()
    with pytest.raises(ConfigError, match=r"max_characters=0"):
        Perplexity(text_file=None, max_characters=0)
