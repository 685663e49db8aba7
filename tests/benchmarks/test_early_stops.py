"""Early stops of written answers in a benchmark: its key, its errors, and its scores on a real model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.beside_harness import Work, benchmark_of
from benchmarks.eval_speed import ANSWER_PATTERNS, breaking_edit
from editeval.benchmarks.lm_harness import HarnessBenchmark
from editeval.build import build
from editeval.inference.edited import EditedModel
from editeval.types import ConfigError
from tests.benchmarks.conftest import context_of
from tests.conftest import REPOSITORY, Compose

BBH = "bbh_cot_fewshot_boolean_expressions"


def test_key_of_a_benchmark_without_early_stops_is_what_it_was(harness: Callable[..., HarnessBenchmark]) -> None:
    plain = harness("write").settings()
    assert {"loop_repeats", "answer_pattern"}.isdisjoint(plain)
    assert harness("write", loop_repeats=4).settings() == {**plain, "loop_repeats": 4}
    assert harness("write", answer_pattern="a b").settings() == {**plain, "answer_pattern": "a b"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loop_repeats": 1}, r"benchmark\.small\.loop_repeats=1 must be a whole number of at least 2"),
        ({"answer_pattern": "(a"}, r"benchmark\.small\.answer_pattern='\(a' is no regular expression"),
    ],
)
def test_impossible_early_stops_name_the_setting(harness: Callable[..., HarnessBenchmark], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        harness("write", **changes)


def test_a_refused_setting_is_named_once(compose_config: Compose) -> None:
    node = compose_config("benchmark=gsm8k", "benchmark.gsm8k.loop_repeats=1").benchmark.gsm8k
    with pytest.raises(ConfigError, match=r"^benchmark\.gsm8k\.loop_repeats=1 must be"):
        build(node, "benchmark.gsm8k", HarnessBenchmark)


def test_answers_of_a_task_end_behind_the_pattern(
    harness: Callable[..., HarnessBenchmark], tiny: Callable[[str], EditedModel], tmp_path: Path
) -> None:
    model = tiny("llama")
    plain = harness("write").evaluate(model, context_of(tmp_path)).samples
    short = harness("write", answer_pattern="[a-z]").evaluate(model, context_of(tmp_path)).samples
    for whole, cut in zip(plain, short, strict=True):
        assert whole["generated"].startswith(cut["generated"])
    assert [record["generated"] for record in short] != [record["generated"] for record in plain]


@pytest.mark.parametrize(
    ("name", "read", "text"),
    [
        ("gsm8k", r"The answer is (\-?[0-9\.\,]+).", "She has 8 left. The answer is 1,208.\n\nQ: The answer is 7."),
        ("gsm8k", r"The answer is (\-?[0-9\.\,]+).", "The answer is -3.5 dollars. So The answer is 9."),
        ("gsm8k", r"The answer is (\-?[0-9\.\,]+).", "The answer is $5. The answer is 15 of them"),
        ("bbh", r"(?<=the answer is )(.*)(?=.)", "So the answer is (A).\nBut the answer is (B).\n"),
        ("bbh", r"(?<=the answer is )(.*)(?=.)", "the answer is \nNow the answer is True and not False.\nMore"),
    ],
)
def test_patterns_of_the_conf_files_keep_what_the_task_reads(name: str, read: str, text: str) -> None:
    (line,) = [line for line in (REPOSITORY / "conf" / "benchmark" / f"{name}.yaml").read_text().splitlines() if "answer_pattern" in line]
    pattern = yaml.safe_load(line.removeprefix("# "))["answer_pattern"]
    assert pattern == ANSWER_PATTERNS[name]
    # The text is seen as it grows, and ends at the first match.
    ended = next(text[: found.end()] for size in range(len(text) + 1) if (found := re.search(pattern, text[:size])))
    assert len(ended) < len(text)
    first = [re.search(read, seen) for seen in (ended, text)]
    assert first[0] is not None
    assert first[1] is not None
    assert first[0].groups() == first[1].groups()


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [("gsm8k", {"limit": 3, "max_new_tokens": 64}), ("bbh", {"task": BBH, "limit": 5, "max_new_tokens": 96})]
)
def test_scores_of_real_questions_stay_and_fewer_tokens_are_decoded(
    smollm2: EditedModel, shared_data: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    benchmark = benchmark_of(Work(benchmark=name, changes=changes), data=shared_data)
    smollm2.apply(breaking_edit(smollm2))  # as it is, the model ends its texts by itself, or wanders on
    counts = []
    scored = []
    for settings in ({}, {"loop_repeats": 2}, {"loop_repeats": 2, "answer_pattern": ANSWER_PATTERNS[name]}):
        decoded = _count(smollm2)
        samples = replace(benchmark, **settings).evaluate(smollm2, context_of(tmp_path)).samples  # type: ignore[arg-type]
        counts.append(decoded())
        # The metric of the first match; another filter of GSM8K reads the last number, which may stand behind the answer.
        scored.append(
            [(record["item"], record["metrics"], record["answer"]) for record in samples if record["filter"] != "flexible-extract"]
        )
    smollm2.restore()
    assert scored[0] == scored[1] == scored[2]
    assert counts[2] <= counts[1] <= counts[0]
    assert counts[2] < counts[0]


def _count(model: EditedModel) -> Callable[[], int]:
    """Count the tokens that are decoded until the returned function is called."""
    tokens = [0]

    def hook(_module: torch.nn.Module, _arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        rows, width = options["input_ids"].shape
        tokens[0] += rows if width == 1 else 0

    handle = model.lm.module.register_forward_pre_hook(hook, with_kwargs=True)

    def stop() -> int:
        handle.remove()
        return tokens[0]

    return stop
