"""Verdicts on studies whose truth was planted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from editeval.report.findings import findings
from editeval.report.findings_models import area_difference
from editeval.report.intervals import wilson
from editeval.report.items import Items, choice
from editeval.report.series import Series, changes, p_value, series_of
from editeval.report.study import Studies, read_study, studies
from editeval.report.verdicts import Outcome, Verdict, by_majority
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import write_collapse
from editeval.types import EditevalError
from tests.report.synthetic import Planted, PlantedRun, Share, falls_at, keeps, write_run

KNOWN = studies()
LADDER = (1, 10, 100, 1000)
THREE = ("rome", "memit", "kn")


def benchmarks(kept: Share, n: int = 300, names: Iterable[str] = ("mmlu", "gsm8k", "piqa")) -> tuple[Planted, ...]:
    return tuple(Planted(name=name, kept=kept, n=n) for name in names)


def study(root: Path, runs: Iterable[PlantedRun], known: Studies = KNOWN) -> tuple[Series, ...]:
    return series_of(read_study([write_run(root, run) for run in runs], known), known)


def verdict(series: tuple[Series, ...], key: str, known: Studies = KNOWN) -> Verdict:
    return next(found for found in findings(series, known) if found.key == key)


# -- RQ1 -------------------------------------------------------------------------------------------------------------------


def test_methods_that_all_fall_after_dozens_of_edits_confirm_it_and_refute_thousands(tmp_path: Path) -> None:
    runs = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(falls_at(20))) for name in ("rome", "memit", "kn")]
    series = study(tmp_path, runs)
    assert verdict(series, "F4.1a").outcome == Outcome.CONFIRMED
    assert verdict(series, "F4.1b").outcome == Outcome.REFUTED


def test_methods_that_keep_ability_and_edits_refute_dozens_and_confirm_thousands(tmp_path: Path) -> None:
    runs = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(keeps(1.0))) for name in ("rome", "memit", "alphaedit")]
    series = study(tmp_path, runs)
    assert verdict(series, "F4.1a").outcome == Outcome.REFUTED
    assert verdict(series, "F4.1b").outcome == Outcome.CONFIRMED


def test_a_method_whose_edits_are_not_there_confirms_nothing_however_flat_its_curve(tmp_path: Path) -> None:
    runs = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(falls_at(20))) for name in ("rome", "memit", "kn")]
    idle = PlantedRun(method="pmet", rungs=LADDER, benchmarks=benchmarks(keeps(1.0)), efficacy=keeps(0.0))
    series = study(tmp_path, [*runs, idle])
    thousands = verdict(series, "F4.1b")
    assert thousands.outcome == Outcome.REFUTED
    assert "without the edits: pmet" in thousands.reason
    assert "Not counted, because the edits are not there: pmet" in verdict(series, "F4.1a").reason


def test_settings_of_a_method_are_one_method_with_one_vote(tmp_path: Path) -> None:
    falling = [PlantedRun(rungs=LADDER, benchmarks=benchmarks(falls_at(20)), settings={"lr": rate}) for rate in (0.1, 0.5, 1)]
    alone = study(tmp_path / "alone", falling)
    assert len(alone) == 3
    for key in ("F4.1a", "F4.1b"):
        assert verdict(alone, key).outcome == Outcome.UNDECIDED
    assert "At least 3 methods are needed" in verdict(alone, "F4.1a").reason
    others = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(keeps(1.0))) for name in ("memit", "alphaedit")]
    found = verdict(study(tmp_path / "three", [*falling, *others]), "F4.1a")
    assert found.outcome == Outcome.REFUTED  # one method of three, though three series of five
    assert "1 for, 2 against" in found.reason


def test_the_majority_of_its_settings_is_the_vote_of_a_method_and_a_tie_is_open() -> None:
    votes = by_majority([("a", True), ("a", True), ("a", False), ("b", True), ("b", False), ("c", False), ("d", None)])
    assert (votes.yes, votes.no, votes.open) == (["a"], ["c"], ["b", "d"])


def test_controls_have_no_vote(tmp_path: Path) -> None:
    runs = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(falls_at(20))) for name in ("rome", "none", "random")]
    found = verdict(study(tmp_path, runs), "F4.1a")
    assert found.outcome == Outcome.UNDECIDED
    assert [row[1] for row in found.table[1:]] == ["rome"]


def test_short_ladders_leave_thousands_open(tmp_path: Path) -> None:
    runs = [PlantedRun(method=name, rungs=(1, 10), benchmarks=benchmarks(keeps(1.0))) for name in ("rome", "memit", "kn")]
    found = verdict(study(tmp_path, runs), "F4.1b")
    assert found.outcome == Outcome.UNDECIDED
    assert "The largest rung is 10" in found.reason


def test_few_items_leave_open_what_many_decide(tmp_path: Path) -> None:
    runs = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(keeps(0.97), n=24)) for name in ("rome", "memit", "kn")]
    assert verdict(study(tmp_path, runs), "F4.1a").outcome == Outcome.UNDECIDED


# -- RQ2 to RQ5 ------------------------------------------------------------------------------------------------------------


def sibling_runs(*, tuned: Share, orders: int = 3, methods: Sequence[str] = THREE) -> list[PlantedRun]:
    return [
        PlantedRun(model=model, method=method, seed=seed, benchmarks=benchmarks(kept))
        for method in methods
        for model, kept in (("llama2-7b", falls_at(20)), ("llama2-7b-chat", tuned))
        for seed in range(orders)
    ]


def siblings(root: Path, *, tuned: Share, orders: int, methods: Sequence[str] = THREE) -> tuple[Series, ...]:
    return study(root, sibling_runs(tuned=tuned, orders=orders, methods=methods))


def test_a_tuned_model_that_falls_later_confirms_and_one_that_falls_alike_does_not(tmp_path: Path) -> None:
    later = verdict(siblings(tmp_path / "later", tuned=falls_at(200), orders=3), "F4.2")
    assert later.outcome == Outcome.CONFIRMED
    assert verdict(siblings(tmp_path / "alike", tuned=falls_at(20), orders=3), "F4.2").outcome != Outcome.CONFIRMED
    assert verdict(siblings(tmp_path / "earlier", tuned=falls_at(2), orders=3), "F4.2").outcome == Outcome.REFUTED


def test_two_orders_of_edits_are_too_few_to_say_that_tuned_models_are_better(tmp_path: Path) -> None:
    found = verdict(siblings(tmp_path, tuned=falls_at(200), orders=2), "F4.2")
    assert found.outcome == Outcome.UNDECIDED
    assert "Needs 3 orders" in found.reason


def test_two_methods_are_too_few_to_say_that_tuned_models_are_better(tmp_path: Path) -> None:
    found = verdict(siblings(tmp_path, tuned=falls_at(200), orders=3, methods=THREE[:2]), "F4.2")
    assert found.outcome == Outcome.UNDECIDED
    assert "2 for, 0 against, 0 open. At least 3 methods are needed" in found.reason


def test_a_second_setting_on_one_model_leaves_its_pair_as_it_was(tmp_path: Path) -> None:
    runs = [replace(run, settings={"lr": 1}) for run in sibling_runs(tuned=falls_at(200))]
    other = replace(runs[0], settings={"lr": 2})
    found = verdict(study(tmp_path, [*runs, other]), "F4.2")
    assert found.outcome == Outcome.CONFIRMED
    assert "rome (lr=1)" in {row[1] for row in found.table}
    assert "Not compared" in found.reason
    assert "rome (lr=2) on llama2-7b" in found.reason


def test_a_tuned_model_is_compared_under_each_format_of_its_prompts(tmp_path: Path) -> None:
    folders = []
    for model, kept, form in (("llama2-7b", 20, "raw"), ("llama2-7b-chat", 200, "raw"), ("llama2-7b-chat", 20, "chat")):
        for seed in range(3):
            folder = write_run(tmp_path / form, PlantedRun(model=model, seed=seed, benchmarks=benchmarks(falls_at(kept))))
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["config"]["prompt_format"] = form
            (folder / "manifest.json").write_text(json.dumps(manifest))
            folders.append(folder)
    found = verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.2")
    assert [row[1] for row in found.table[1:]] == ["rome (prompt_format=raw)", "rome (prompt_format=chat)"]


def test_models_that_were_edited_with_other_facts_are_not_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, run) for run in sibling_runs(tuned=falls_at(200), methods=("rome",))]
    edits = folders[-1] / "edits.jsonl"
    edits.write_text(edits.read_text().replace("fact-10", "another"))
    found = verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.2")
    assert (found.outcome, len(found.table)) == (Outcome.UNDECIDED, 1)
    assert "edits, orders" in found.reason
    assert "Llama 2 7B rome" in found.reason


def test_a_score_that_is_no_number_under_one_order_keeps_the_others_from_deciding_alone(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, run) for run in sibling_runs(tuned=falls_at(200), methods=("rome",))]
    scores = folders[0] / "scores.jsonl"
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    for row in rows:
        if (row["num_edits"], row["benchmark"]) == (100, "mmlu"):
            row |= {"value": None, "non_finite": {"value": "nan"}}
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.2")
    assert "broken under some orders only: Llama 2 7B rome" in found.reason


def broken(root: Path, run: PlantedRun, *, step: int, rungs: Sequence[int]) -> Path:
    """Write a run that broke at a step, so that it was measured at these rungs only (none: unedited only)."""
    folder = write_run(root, replace(run, rungs=rungs or run.rungs))
    if not rungs:
        scores = folder / "scores.jsonl"
        scores.write_text("".join(line for line in scores.read_text().splitlines(keepends=True) if json.loads(line)["num_edits"] == 0))
    write_collapse(folder, step=step, digest="x", request_ids=["fact"], reason="not a number")
    return folder


@pytest.mark.parametrize("rungs", [(1, 10), ()])
def test_a_base_model_that_breaks_where_the_tuned_one_is_whole_is_for_the_tuned_one(tmp_path: Path, rungs: tuple[int, ...]) -> None:
    folders = []
    for method, seed in itertools.product(THREE, range(3)):
        base = PlantedRun(model="llama2-7b", method=method, seed=seed, benchmarks=benchmarks(keeps(0.999)))
        folders += [broken(tmp_path, base, step=max(rungs, default=0) + 1, rungs=rungs)]
        folders += [write_run(tmp_path, replace(base, model="llama2-7b-chat"))]
    found = verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.2")
    assert found.outcome == Outcome.CONFIRMED
    assert found.table[1][4].endswith("to 100")


def test_a_model_that_breaks_under_some_orders_only_is_not_compared_by_those_it_survived(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        base = PlantedRun(model="llama2-7b", seed=seed, benchmarks=benchmarks(falls_at(20)))
        folders += [broken(tmp_path, base, step=11, rungs=(1, 10)) if seed else write_run(tmp_path, base)]
        folders += [write_run(tmp_path, replace(base, model="llama2-7b-chat"))]
    found = verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.2")
    assert found.outcome == Outcome.UNDECIDED
    assert "broken under some orders only: Llama 2 7B rome" in found.reason


def test_pairs_that_lost_nothing_have_no_vote_on_who_loses_more_slowly(tmp_path: Path) -> None:
    runs = [
        PlantedRun(model=model, method=method, seed=seed, benchmarks=benchmarks(kept))
        for method, both in (
            *((name, (falls_at(20), falls_at(200))) for name in THREE),
            *((name, (keeps(1.0),) * 2) for name in ("grace", "pmet")),
        )
        for model, kept in zip(("llama2-7b", "llama2-7b-chat"), both, strict=True)
        for seed in range(3)
    ]
    found = verdict(study(tmp_path, runs), "F4.2")
    assert found.outcome == Outcome.CONFIRMED
    assert "neither model surely lost anything: Llama 2 7B grace, Llama 2 7B pmet" in found.reason


def test_a_method_that_breaks_the_model_before_the_first_rung_has_a_vote(tmp_path: Path) -> None:
    whole = PlantedRun(method="alphaedit", rungs=(10, 100), benchmarks=benchmarks(keeps(1.0)))
    folders = [write_run(tmp_path, whole)]
    folders += [broken(tmp_path, replace(whole, method=name), step=3, rungs=()) for name in ("rome", "kn", "memit")]
    series = series_of(read_study(folders, KNOWN), KNOWN)
    found = verdict(series, "F4.1a")
    assert found.outcome == Outcome.CONFIRMED
    assert {row[1]: row[5] for row in found.table[1:]} == {"alphaedit": "–", "rome": "3", "kn": "3", "memit": "3"}
    scaled = verdict(series, "F4.1b")
    assert (scaled.outcome, "All 3 series of the paper's methods" in scaled.reason) == (Outcome.REFUTED, True)


def test_a_method_that_breaks_the_model_before_the_first_rung_under_one_order_is_open(tmp_path: Path) -> None:
    whole = PlantedRun(method="kn", rungs=(10, 100), benchmarks=benchmarks(keeps(1.0)))
    folders = [broken(tmp_path, whole, step=3, rungs=()), write_run(tmp_path, replace(whole, seed=1))]
    (one,) = series_of(read_study(folders, KNOWN), KNOWN)
    found = verdict((one,), "F4.1a")
    assert [row[1:6] for row in found.table[1:]] == [("kn", "counterfact", "–", "–", "–")]
    assert "0 for, 0 against, 1 open" in found.reason
    assert verdict((one,), "F4.1b").outcome == Outcome.UNDECIDED
    assert "broke under some of them before any rung, at edit 3 (order 0)" in " ".join(one.notes)


def test_the_median_of_n90_is_of_the_series_that_are_counted(tmp_path: Path) -> None:
    falling = [PlantedRun(method=name, rungs=LADDER, benchmarks=benchmarks(falls_at(20))) for name in THREE]
    idle = [PlantedRun(method=f"idle{place}", rungs=LADDER, benchmarks=benchmarks(keeps(1.0)), efficacy=keeps(0.0)) for place in range(4)]
    found = verdict(study(tmp_path, [*falling, *idle]), "F4.1a")
    assert found.outcome == Outcome.CONFIRMED
    assert "median n90 of counted series 1." in found.reason


def test_what_a_published_code_did_wrong_has_no_vote(tmp_path: Path) -> None:
    runs = [
        PlantedRun(method="mend", settings={"accumulate": on}, rungs=LADDER, benchmarks=benchmarks(falls_at(20) if on else keeps(1.0)))
        for on in (True, False)
    ]
    series = study(tmp_path, runs)
    assert [one.method for one in series if one.reproduces_a_fault] == ["mend (accumulate=False)"]
    found = verdict(series, "F4.1a")
    assert [row[1] for row in found.table[1:]] == ["mend (accumulate=True)"]
    assert "1 for, 0 against, 0 open" in found.reason


def test_a_size_that_broke_counts_as_one_that_kept_nothing(tmp_path: Path) -> None:
    folders = []
    for (place, model), method in itertools.product(enumerate(KNOWN.families["Pythia"]), THREE[:2]):
        run = PlantedRun(model=model, method=method, rungs=(10, 50), benchmarks=benchmarks(falls_at(5 * 2**place)))
        folders += [write_run(tmp_path, run) if place else broken(tmp_path, run, step=3, rungs=())]
    found = verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.3")
    assert found.outcome == Outcome.CONFIRMED
    assert found.table[1][3:6] == ("10", "3", str(len(KNOWN.families["Pythia"])))


def test_sizes_are_compared_on_the_benchmarks_that_all_of_them_can_lose(tmp_path: Path) -> None:
    """Size has no effect on what is common; each larger model is above chance on one more benchmark, which no edit harms."""
    runs, apart = [], []
    for place, model in enumerate(KNOWN.families["Pythia"]):
        common = benchmarks(keeps(0.6), n=1000, names=("lambada", "boolq"))
        easy = tuple(Planted(name=f"easy{other}", kept=keeps(1.0), base=0.75 if place > other else 0.25) for other in range(6))
        runs.append(PlantedRun(model=model, rungs=(50,), benchmarks=(*common, *easy)))
        apart.append(PlantedRun(model=model, rungs=(50,), benchmarks=benchmarks(keeps(0.6), names=(f"only{place % 2}",))))
    found = verdict(study(tmp_path / "common", runs), "F4.3")
    assert found.outcome != Outcome.CONFIRMED
    assert found.table[1][4] == "2"
    assert "no benchmark on which every size" in verdict(study(tmp_path / "apart", apart), "F4.3").reason


def test_a_method_that_keeps_its_last_edit_only_says_nothing_of_models(tmp_path: Path) -> None:
    """MEND without accumulation: at one edit everything is there, at fifty nothing is."""
    last = PlantedRun(method="mend", rungs=(1, 50), efficacy=lambda n: float(n == 1))
    tuned = [
        replace(last, model=model, seed=seed, benchmarks=benchmarks(kept))
        for model, kept in (("llama2-7b", falls_at(20)), ("llama2-7b-chat", keeps(1.0)))
        for seed in range(3)
    ]
    found = verdict(study(tmp_path / "tuned", tuned), "F4.2")
    assert (found.outcome, len(found.table)) == (Outcome.UNDECIDED, 1)
    sizes = [
        replace(last, model=model, benchmarks=benchmarks(falls_at(20 * 1.3**place), n=1000))
        for place, model in enumerate(KNOWN.families["Pythia"])
    ]
    found = verdict(study(tmp_path / "sizes", sizes), "F4.3")
    assert (found.outcome, found.table[1][3]) == (Outcome.UNDECIDED, "50")


def test_orders_that_disagree_on_efficacy_do_not_show_that_edits_are_there(tmp_path: Path) -> None:
    runs = [
        PlantedRun(seed=seed, rungs=(100,), efficacy=keeps(share), benchmarks=benchmarks(keeps(1.0))) for seed, share in ((0, 0), (1, 0.4))
    ]
    both = study(tmp_path, runs)[0]
    assert not both.edits_are_there(100)
    (one,) = series_of(read_study([tmp_path / runs[1].name], KNOWN), KNOWN)
    assert one.edits_are_there(100)
    assert one.efficacy[100] == wilson(one.efficacy[100].value * 100, 100)


def test_the_interval_of_efficacy_covers_the_mean_over_orders(tmp_path: Path) -> None:
    series = study(tmp_path, [PlantedRun(seed=seed, rungs=(100,)) for seed in range(3)])[0]
    random, repeats, covered = np.random.default_rng(14), 400, 0
    for _ in range(repeats):
        for run in series.runs:
            column = run.edit_column("efficacy")
            assert column is not None
            share = random.binomial(100, np.clip(random.normal(0.6, 0.2), 0, 1)) / 100
            run.table.cells[100, column] = replace(run.table.cells[100, column], value=share)  # type: ignore[index]
        interval = series.quality("efficacy")[100]
        covered += interval.low <= 0.6 <= interval.high
    assert 0.92 <= covered / repeats <= 0.98  # pooled as independent facts: .36


def test_the_area_between_siblings_is_the_planted_one(tmp_path: Path) -> None:
    base, tuned = siblings(tmp_path, tuned=keeps(1.0), orders=3, methods=("rome",))
    found = area_difference(base, tuned)
    assert found is not None
    areas, orders, rungs = found
    heights = np.interp(np.linspace(0, np.log1p(100), 20001), np.log1p([0, 1, 10, 100]), [1, *(falls_at(20)(rung) for rung in rungs)])
    assert orders == 3
    assert areas[2].interval().low < 1 - heights.mean() < areas[2].interval().high


def test_scale_is_tested_where_something_was_lost_and_needs_five_sizes(tmp_path: Path) -> None:
    names = list(KNOWN.families["Pythia"])
    one = [PlantedRun(model=name, rungs=(10, 50), benchmarks=benchmarks(falls_at(5 * 2**place))) for place, name in enumerate(names)]
    alone = verdict(study(tmp_path / "alone", one), "F4.3")
    assert alone.outcome == Outcome.UNDECIDED
    assert "At least 2 methods are needed" in alone.reason
    grows = [*one, *(replace(run, method="memit") for run in one)]
    whole = verdict(study(tmp_path / "whole", grows), "F4.3")
    assert whole.outcome == Outcome.CONFIRMED
    few = verdict(study(tmp_path / "few", one[:4]), "F4.3")
    assert few.outcome == Outcome.UNDECIDED
    assert "4 sizes" in few.reason
    flat = [replace(run, benchmarks=benchmarks(keeps(1.0))) for run in one]
    assert "nothing lost" in verdict(study(tmp_path / "flat", flat), "F4.3").reason
    folders = [write_run(tmp_path / "other facts", run) for run in one]
    edits = folders[-1] / "edits.jsonl"
    edits.write_text(edits.read_text().replace("fact-10", "another"))
    assert "not the same edits at every size" in verdict(series_of(read_study(folders, KNOWN), KNOWN), "F4.3").reason


def test_larger_models_that_lose_more_refute_that_they_lose_less_and_sizes_without_an_order_leave_it_open(tmp_path: Path) -> None:
    names = list(KNOWN.families["Pythia"])

    def sizes(root: Path, edits: Iterable[float]) -> Verdict:
        runs = [
            PlantedRun(model=name, method=method, rungs=(10, 50), benchmarks=benchmarks(falls_at(half)))
            for name, half in zip(names, edits, strict=True)
            for method in THREE[:2]
        ]
        return verdict(study(root, runs), "F4.3")

    shrinks = sizes(tmp_path / "shrinks", [5 * 2**place for place in reversed(range(len(names)))])
    assert shrinks.outcome == Outcome.REFUTED
    assert float(shrinks.table[1][6]) < -0.9
    assert "0 for, 2 against, 0 open" in shrinks.reason
    mixed = sizes(tmp_path / "mixed", [5, 40, 10, 80, 7, 20, 14])
    assert (mixed.outcome, len(mixed.table)) == (Outcome.UNDECIDED, 3)
    assert "0 for, 0 against, 2 open" in mixed.reason


@pytest.mark.parametrize(("factors", "outcome"), [((1, 1, 1, 1), Outcome.CONFIRMED), ((0.1, 0.5, 2, 10), Outcome.REFUTED)])
def test_equal_decline_is_told_from_unequal(tmp_path: Path, factors: tuple[float, ...], outcome: Outcome) -> None:
    planted = tuple(
        Planted(name=name, kept=falls_at(100 * factor), n=4000)
        for name, factor in zip(("mmlu", "gsm8k", "piqa", "bbh"), factors, strict=True)
    )
    runs = [PlantedRun(method=method, rungs=(10, 100), benchmarks=planted) for method in THREE]
    assert verdict(study(tmp_path / "three", runs), "F4.4").outcome == outcome
    alone = [replace(runs[0], model=model) for model in ("a", "b", "c")]
    found = verdict(study(tmp_path / "one method on three models", alone), "F4.4")
    assert found.outcome == Outcome.UNDECIDED
    assert "At least 3 methods are needed" in found.reason


def test_safety_counts_only_where_ability_is_kept(tmp_path: Path) -> None:
    drop = Planted(name="truthfulqa", kept=keeps(0.5), n=500)
    kept = study(tmp_path / "kept", [PlantedRun(benchmarks=(*benchmarks(keeps(0.99), n=2000), drop))])
    assert verdict(kept, "F4.5").outcome == Outcome.CONFIRMED
    broken = study(tmp_path / "broken", [PlantedRun(benchmarks=(*benchmarks(keeps(0.2)), drop))])
    assert verdict(broken, "F4.5").outcome == Outcome.UNDECIDED
    few = replace(PlantedRun(benchmarks=(*benchmarks(keeps(1.0), n=2000), replace(drop, kept=keeps(1.0), n=2000))), rungs=(10,))
    found = verdict(study(tmp_path / "few", [few]), "F4.5")
    assert found.outcome == Outcome.UNDECIDED  # ten edits say nothing of dozens
    assert "none of them is of dozens" in found.reason


def safety(root: Path, planted: Planted, *, methods: Sequence[str], rungs: Sequence[int] = (50,)) -> Verdict:
    """Return F4.5 of methods that keep ability and do to safety what is planted."""
    runs = [PlantedRun(method=method, rungs=rungs, benchmarks=(*benchmarks(keeps(1.0), n=2000), planted)) for method in methods]
    return verdict(study(root, runs), "F4.5")


def test_a_loss_of_safety_is_refuted_only_by_three_methods_that_could_have_shown_it(tmp_path: Path) -> None:
    whole, three = Planted(name="truthfulqa", kept=keeps(1.0), n=2000), ("rome", "memit", "kn")
    assert safety(tmp_path / "three", whole, methods=three).outcome == Outcome.REFUTED
    one = safety(tmp_path / "one", whole, methods=three[:1])
    assert (one.outcome, "of 1 method only" in one.reason) == (Outcome.UNDECIDED, True)
    guessed = safety(tmp_path / "guessed", replace(whole, kept=keeps(0.0), base=0.25), methods=three)
    assert (guessed.outcome, "above chance" in guessed.reason) == (Outcome.UNDECIDED, True)
    tiny = safety(tmp_path / "tiny", replace(whole, n=8), methods=three)
    assert (tiny.outcome, "not excluded" in tiny.reason) == (Outcome.UNDECIDED, True)


def test_a_loss_of_safety_under_one_order_of_three_is_no_loss_beyond_chance(tmp_path: Path) -> None:
    runs = [
        PlantedRun(seed=seed, rungs=(50,), benchmarks=(*benchmarks(keeps(1.0), n=600), Planted(name="truthfulqa", kept=keeps(kept), n=600)))
        for seed, kept in enumerate((0.6, 1.0, 1.0))
    ]
    found = verdict(study(tmp_path, runs), "F4.5")
    assert found.outcome == Outcome.UNDECIDED
    assert float(found.table[1][-1]) > 0.05


def test_a_loss_under_every_order_is_found_among_many_tests(tmp_path: Path) -> None:
    lost = Planted(name="truthfulqa", kept=keeps(0.5), n=300)
    runs = [
        PlantedRun(method=f"method{place}", seed=seed, rungs=(24, 30, 40, 50, 60), benchmarks=(*benchmarks(keeps(1.0)), lost))
        for place in range(11)
        for seed in range(3)
    ]
    found = verdict(study(tmp_path, runs), "F4.5")
    assert len(found.table) - 1 == 55  # of each of which a bootstrap of 2,000 would say no less than .001, so .055 adjusted
    assert found.outcome == Outcome.CONFIRMED


def test_thousands_of_edits_say_nothing_of_dozens(tmp_path: Path) -> None:
    found = safety(tmp_path, Planted(name="truthfulqa", kept=keeps(0.5), n=500), methods=("rome",), rungs=(1000,))
    assert found.outcome == Outcome.UNDECIDED
    assert len(found.table) == 1


# -- muting ----------------------------------------------------------------------------------------------------------------


def muted_series(root: Path, kept: Sequence[Share], *, rung: int = 10_000, n: int = 60) -> tuple[Series, ...]:
    """Return methods that after so many edits still answer this share of what they knew, and write nothing to the rest."""
    runs = [
        PlantedRun(
            method=f"method{place}",
            rungs=(10, rung),
            benchmarks=tuple(
                Planted(name=name, kept=share, base=0.95, chance=0, generated=True, n=n) for name in ("gsm8k", "triviaqa", "bbh")
            ),
        )
        for place, share in enumerate(kept)
    ]
    return study(root, runs)


def muted(root: Path, kept: Sequence[Share], *, rung: int = 10_000, n: int = 60) -> Verdict:
    return verdict(muted_series(root, kept, rung=rung, n=n), "F-mute")


def test_models_that_write_nothing_after_ten_thousand_edits_confirm_that_they_are_mute(tmp_path: Path) -> None:
    few = muted(tmp_path / "two", [falls_at(100)] * 2)
    assert (few.outcome, "At least 3 methods are needed" in few.reason) == (Outcome.UNDECIDED, True)
    found = muted(tmp_path / "three", [falls_at(100)] * 3)
    assert found.outcome == Outcome.CONFIRMED
    assert found.table[1][:4] == ("tiny", "method0", "counterfact", "10000")
    assert 0.5 < float(found.table[1][4]) < 0.95  # what edit quality has them write is among it, and is whole here


def test_models_that_still_write_after_ten_thousand_edits_refute_it(tmp_path: Path) -> None:
    found = muted(tmp_path, [keeps(1.0), keeps(0.8), falls_at(100)])
    assert found.outcome == Outcome.REFUTED
    assert "1 for, 2 against, 0 open" in found.reason


def test_fewer_edits_or_as_many_mute_models_as_others_leave_open_whether_they_are_mute(tmp_path: Path) -> None:
    fewer = muted(tmp_path / "fewer", [falls_at(100)], rung=9_999)
    assert fewer.outcome == Outcome.UNDECIDED
    assert "No series reaches 10,000 edits" in fewer.reason
    assert fewer.table[1][3] == "9999"
    even = muted(tmp_path / "even", [falls_at(100), keeps(1.0)] * 2)
    assert even.outcome == Outcome.UNDECIDED
    assert "2 for, 2 against, 0 open" in even.reason


def test_a_few_texts_about_half_of_them_empty_leave_open_whether_models_are_mute(tmp_path: Path) -> None:
    few = muted(tmp_path / "few", [keeps(0.2)] * 3, n=20)
    assert all(float(row[4]) > 0.5 for row in few.table[1:])
    assert (few.outcome, "1 for, 0 against, 2 open" in few.reason) == (Outcome.UNDECIDED, True)
    low, high = map(float, few.table[1][5].split(" to "))
    assert low < 0.5 < high


def test_a_model_that_wrote_nothing_before_its_edits_is_not_muted_by_them(tmp_path: Path) -> None:
    series = muted_series(tmp_path, [falls_at(100)] * 3)
    assert verdict(series, "F-mute").outcome == Outcome.CONFIRMED
    for one in series:
        signs = one.runs[0].degenerate
        for (rung, benchmark), found in list(signs.items()):
            signs[rung, benchmark] = found if rung else signs[10_000, benchmark]
    found = verdict(series, "F-mute")
    assert (found.outcome, "3 open" in found.reason) == (Outcome.UNDECIDED, True)
    assert found.table[1][6] == found.table[1][4]


def test_orders_that_disagree_leave_open_whether_models_are_mute(tmp_path: Path) -> None:
    series = muted_series(tmp_path, [falls_at(100)] * 3)
    twice = [replace(one, runs=(one.runs[0], replace(one.runs[0], seed=1, degenerate=dict(one.runs[0].degenerate)))) for one in series]
    assert "3 for" in verdict(tuple(twice), "F-mute").reason
    for one in twice:
        signs = one.runs[1].degenerate
        for benchmark in ("gsm8k", "triviaqa", "bbh"):
            signs[10_000, benchmark] = replace(signs[10_000, benchmark], broken_texts=0.6)
    assert "3 open" in verdict(tuple(twice), "F-mute").reason


# -- series ----------------------------------------------------------------------------------------------------------------


def test_settings_that_differ_make_series_of_their_own_and_seeds_do_not(tmp_path: Path) -> None:
    runs = [
        PlantedRun(method="mend", seed=seed, benchmarks=benchmarks(keeps(1.0)), settings={"accumulate": on})
        for on in (True, False)
        for seed in (0, 1)
    ]
    series = study(tmp_path, runs)
    assert {one.method: one.seeds for one in series} == {"mend (accumulate=True)": (0, 1), "mend (accumulate=False)": (0, 1)}


def test_a_benchmark_at_chance_is_not_counted_and_protocols_are_not_mixed(tmp_path: Path) -> None:
    planted = (
        *benchmarks(keeps(0.9)),
        Planted(name="bbh", kept=keeps(1.0), base=0.25),
        Planted(name="triviaqa", kept=keeps(1.0), chance=0, generated=True),
    )
    (one,) = study(tmp_path, [PlantedRun(benchmarks=planted)])
    assert [column.benchmark for column in one.counted] == ["mmlu", "gsm8k", "piqa"]
    assert one.protocol == "likelihood"
    assert {column.benchmark for column in one.ability if not one.can_show_damage(column)} == {"bbh"}


def test_metrics_of_one_task_are_one_benchmark_and_toxigen_is_its_balanced_accuracy(tmp_path: Path) -> None:
    planted = (
        Planted(name="piqa", kept=falls_at(20), beside=("acc_norm", "acc_mutual_info")),
        Planted(name="toxigen", kept=falls_at(20), n=62, chance=0.5),  # 62 items: the four labels are not equally many
    )
    (one,) = study(tmp_path, [PlantedRun(benchmarks=planted)])
    assert [column.metric for column in one.counted] == ["acc"]
    (column,) = one.safety
    assert column.metric == "balanced_accuracy"
    outcomes = one.runs[0].outcomes[100, column]  # item by item, though no item has this metric
    assert outcomes.values.mean() == pytest.approx(one.runs[0].table.value(100, column))
    assert len(set(outcomes.values)) == 3


def test_changes_are_paired_with_the_unedited_model_and_adjusted_for_their_number(tmp_path: Path) -> None:
    series = study(tmp_path, [PlantedRun(benchmarks=(*benchmarks(falls_at(20)), Planted(name="bbh", kept=keeps(1.0))))])
    found = changes(series)
    assert len(found) == 4 * 3
    assert all(change.adjusted >= change.p_value for change in found)
    assert all(change.p_value == 1 and change.difference == 0 for change in found if change.column.benchmark == "bbh")
    assert all(change.adjusted < 0.001 for change in found if change.column.benchmark != "bbh" and change.rung == 100)


def test_items_that_weigh_differently_are_still_right_or_wrong_and_no_p_value_ends_at_the_resamples() -> None:
    before = np.where(np.arange(940) < 400, 940 / 800, 940 / 1080)  # the weights of ToxiGen's two labels
    after = before * (np.arange(940) % 10 != 0)
    assert p_value(before, after) == pytest.approx(2 * 0.5**94)
    graded = np.random.default_rng(0).random(400)
    assert p_value(graded, graded - graded**2 / 2) < 1e-20
    assert p_value(graded, graded[::-1].copy()) > 0.05


def test_scores_without_samples_still_give_retained_ability_with_a_wider_interval(tmp_path: Path) -> None:
    run = PlantedRun(benchmarks=benchmarks(keeps(0.8), names=("mmlu",)))
    (paired,) = study(tmp_path, [run])
    for path in (tmp_path / run.name / "samples").glob("*-mmlu-*"):
        path.unlink()
    (alone,) = series_of(read_study([tmp_path / run.name], KNOWN), KNOWN)
    assert alone.mean[10].value == pytest.approx(paired.mean[10].value)
    assert alone.mean[10].high - alone.mean[10].low > paired.mean[10].high - paired.mean[10].low


def test_a_folder_of_runs_without_scores_is_refused_with_the_next_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path, PlantedRun())
    (folder / "scores.jsonl").unlink()
    with pytest.raises(EditevalError, match="look with `status`"):
        read_study([folder], KNOWN)


# -- items -----------------------------------------------------------------------------------------------------------------


def test_items_that_do_not_give_the_score_are_not_taken_for_its_items(tmp_path: Path) -> None:
    folder = write_run(tmp_path, PlantedRun(benchmarks=benchmarks(keeps(1.0), names=("mmlu",))))
    store = ScoreStore(folder)
    score = next(score for score in store.scores() if score.benchmark == "mmlu" and score.num_edits == 0)
    items = Items(store.samples(0, "mmlu"))
    assert items.outcomes(score) is not None
    assert items.outcomes(replace(score, value=score.value + 0.01)) is None


def test_a_model_that_always_gives_one_label_has_the_balanced_score_of_guessing(tmp_path: Path) -> None:
    folder = write_run(tmp_path, PlantedRun(benchmarks=benchmarks(keeps(1.0), names=("mmlu",))))
    score = next(score for score in ScoreStore(folder).scores() if score.benchmark == "mmlu")
    items = Items(
        [
            {
                "task": "mmlu",
                "item": item,
                "filter": "none",
                "target": int(item < 30),
                "metrics": {"acc": float(item >= 30)},
                "log_probs": [-1, -2],
            }
            for item in range(100)
        ]
    )
    found = items.outcomes(replace(score, value=0.7), balanced=True)
    assert found is not None
    assert found.values.mean() == pytest.approx(0.5)
    assert items.degenerate.commonest_choice == 1


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", True),
        ("  \n", True),
        ("no " * 12, True),
        ("no no no no no no no no no no", False),  # too short to judge
        ("Paris", False),
        ("(" * 300, True),  # one word each: judged by characters
        ("!" * 24, True),
        ("的" * 200, True),
        ("ofof" * 20, True),
        ("0.3333333333333333", False),
        ("https://en.wikipedia.org/wiki/Antidisestablishmentarianism", False),
        ("the cat sat on the mat and the cat ran", False),
    ],
)
def test_empty_and_repeating_texts_are_degenerate(text: str, broken: bool) -> None:
    assert Items([{"generated": text}]).degenerate.broken_texts == float(broken)


def test_what_the_benchmark_found_with_the_tokens_of_the_model_counts() -> None:
    found = [["repeats"], ["unended"], []]
    items = Items([{"generated": "a good answer", "degenerate": reasons} for reasons in found])
    assert items.degenerate.broken_texts == pytest.approx(1 / 3)


def test_only_a_choice_among_several_is_a_choice() -> None:
    assert choice({"log_probs": [-3.0, -1.0], "metrics": {}}) == 1
    assert choice({"log_probs": [-3.0], "metrics": {}}) is None
    assert choice({"generated": "x"}) is None
