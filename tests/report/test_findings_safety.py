"""F4.5: which runs and rungs say something of safety."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from editeval.report.findings_safety import safety_counts
from editeval.report.items import Items
from editeval.report.verdicts import Outcome, Verdict
from tests.report.synthetic import Planted, PlantedRun, Share, keeps
from tests.report.test_findings import study, verdict

DROP = Planted(name="truthfulqa", kept=keeps(0.5), n=300)
WRITTEN = Planted(name="triviaqa", kept=keeps(1.0), base=0.95, chance=0, generated=True, n=200)


def planted(*more: Planted) -> tuple[Planted, ...]:
    return (*(Planted(name=name, kept=keeps(1.0), n=600) for name in ("mmlu", "piqa")), *more)


def of(root: Path, *runs: PlantedRun) -> Verdict:
    return verdict(study(root, runs), "F4.5")


def test_fewer_than_ten_edits_have_no_test_of_safety(tmp_path: Path) -> None:
    found = of(tmp_path / "few", PlantedRun(rungs=(1, 5, 9), benchmarks=planted(DROP)))
    assert (found.outcome, len(found.table)) == (Outcome.UNDECIDED, 1)
    ten = of(tmp_path / "ten", PlantedRun(rungs=(5, 10), benchmarks=planted(DROP)))
    assert (ten.outcome, [row[3] for row in ten.table[1:]]) == (Outcome.CONFIRMED, ["10"])


def test_a_model_that_often_writes_nothing_says_nothing_of_safety(tmp_path: Path) -> None:
    def written(*kept: Share) -> Sequence[PlantedRun]:
        return [
            PlantedRun(seed=seed, rungs=(50,), benchmarks=planted(DROP, replace(WRITTEN, kept=share))) for seed, share in enumerate(kept)
        ]

    whole = study(tmp_path / "whole", written(keeps(0.97), keeps(0.97)))
    assert verdict(whole, "F4.5").outcome == Outcome.CONFIRMED
    mute = study(tmp_path / "mute", written(keeps(1.0), keeps(0.9)))  # under one order only
    assert mute[0].mean[50].low >= 0.9
    assert not safety_counts(mute[0], 50)
    found = verdict(mute, "F4.5")
    assert (found.outcome, len(found.table)) == (Outcome.UNDECIDED, 1)


def test_what_the_unedited_model_leaves_empty_is_no_sign_of_the_edits(tmp_path: Path) -> None:
    """As a base model does that ends its line before the answer."""
    (one,) = study(tmp_path, [PlantedRun(rungs=(50,), benchmarks=planted(DROP, WRITTEN))])
    signs = one.runs[0].degenerate
    for rung, empty in ((0, 0.7), (50, 0.74)):
        signs[rung, WRITTEN.name] = replace(signs[rung, WRITTEN.name], empty_texts=empty)
    assert safety_counts(one, 50)
    signs[50, WRITTEN.name] = replace(signs[50, WRITTEN.name], empty_texts=0.76)
    assert not safety_counts(one, 50)


def test_empty_texts_are_counted_apart_from_those_that_repeat() -> None:
    found = Items([{"generated": "a", "degenerate": reasons} for reasons in (["empty"], ["repeats"], [], [])]).degenerate
    assert (found.empty_texts, found.broken_texts, found.texts) == (0.25, 0.5, 4)
    by_words = Items([{"generated": ["", " \n", "no " * 12, "Paris"]}]).degenerate
    assert (by_words.empty_texts, by_words.broken_texts, by_words.texts) == (0.5, 0.75, 4)
    none = Items([{"log_probs": [-1.0, -2.0]}]).degenerate
    assert (none.empty_texts, none.texts) == (None, 0)


def test_a_text_that_two_filters_read_is_one_text() -> None:
    records = [
        {"task": "gsm8k", "item": item, "filter": name, "generated": "a", "degenerate": []}
        for item in (0, 1)
        for name in ("strict", "loose")
    ]
    assert Items(records).degenerate.texts == 2


def test_how_many_tests_are_of_tuned_models_is_told(tmp_path: Path) -> None:
    runs = [PlantedRun(model=model, rungs=(50,), benchmarks=planted(DROP)) for model in ("llama2-7b", "llama2-7b-chat", "mistral-7b")]
    found = of(tmp_path, *runs)
    assert found.outcome == Outcome.CONFIRMED
    assert "Of 3 tests 1 is of an instruction-tuned model." in found.reason
