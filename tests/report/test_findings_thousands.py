"""F4.1: who keeps ability for thousands of edits, how sure that is, and where efficacy is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from editeval.report.findings import thousands
from editeval.report.items import Outcomes
from editeval.report.series import Series
from editeval.report.statistics import Estimate, retained
from editeval.report.verdicts import Outcome, Verdict
from tests.report.synthetic import Planted, PlantedRun, Share, falls_at, keeps
from tests.report.test_findings import THREE, study, verdict

RUNGS = (10, 1000)


def planted(kept: Share, n: int = 300) -> tuple[Planted, ...]:
    return (Planted(name="mmlu", kept=kept, n=n), Planted(name="piqa", kept=kept, n=n))


def run_of(method: str, kept: Share, **more: Any) -> PlantedRun:
    return replace(PlantedRun(method=method, rungs=RUNGS, benchmarks=planted(kept)), **more)


def scaled(root: Path, *runs: PlantedRun) -> Verdict:
    return verdict(study(root, runs), "F4.1b")


FALLEN = [run_of(method, falls_at(20)) for method in THREE]


def test_a_later_method_that_holds_confirms_nothing_and_refutes_where_none_of_the_paper_s_does(tmp_path: Path) -> None:
    found = scaled(tmp_path / "fallen", *FALLEN, run_of("alphaedit", keeps(1.0)))
    assert found.outcome == Outcome.REFUTED
    assert "Later methods hold: alphaedit on tiny" in found.reason
    open_ = scaled(tmp_path / "open", run_of("rome", keeps(0.9)), run_of("alphaedit", keeps(1.0)))
    assert open_.outcome == Outcome.REFUTED
    alone = scaled(tmp_path / "alone", run_of("alphaedit", keeps(1.0)))
    assert (alone.outcome, "Later methods hold" in alone.reason) == (Outcome.UNDECIDED, True)  # none of the paper's was measured
    both = scaled(tmp_path / "both", run_of("memit", keeps(1.0)), run_of("alphaedit", keeps(1.0)))
    assert both.outcome == Outcome.CONFIRMED
    assert "memit on tiny: n90 of at least 1000" in both.reason
    assert "Later methods hold: alphaedit on tiny" in both.reason


@pytest.mark.parametrize("key", ["consistent", "prompt"])
def test_rome_with_a_later_key_is_a_later_method(tmp_path: Path, key: str) -> None:
    runs = [run_of("rome", falls_at(20), settings={"key": "mean"}), run_of("rome", keeps(1.0), settings={"key": key})]
    found = scaled(tmp_path, *runs, *FALLEN[1:])
    assert found.outcome == Outcome.REFUTED
    assert f"Later methods hold: rome (key={key}) on tiny" in found.reason


def test_a_later_method_that_is_open_does_not_keep_the_paper_s_from_deciding(tmp_path: Path) -> None:
    found = scaled(tmp_path, *FALLEN, run_of("alphaedit", keeps(1.0), rungs=(10,)))
    assert found.outcome == Outcome.REFUTED
    assert "All 3 series of the paper's methods" in found.reason


def test_a_mend_that_keeps_all_its_edits_and_falls_is_named_for_the_paper_shows_it_flat(tmp_path: Path) -> None:
    found = scaled(tmp_path, *FALLEN[:2], run_of("mend", falls_at(20), settings={"accumulate": True}))
    assert "In the paper's figure these are flat: mend on tiny, surely below 90% at 1000" in found.reason
    last = [run_of("mend", falls_at(20), settings={"accumulate": on}) for on in (True, False)]
    told = scaled(tmp_path / "two", *FALLEN[:2], *last).reason
    assert ("mend (accumulate=True)" in told, "mend (accumulate=False)" in told) == (True, False)


def test_an_interval_of_more_confidence_is_wider_and_that_of_one_benchmark_is_fieller_s() -> None:
    estimate = Estimate(value=1.0, extra_variance=0.01)
    assert estimate.interval(0.9).low == pytest.approx(1 - 1.6449 * 0.1, abs=1e-4)
    assert estimate.interval() == estimate.interval(0.95)
    before = np.repeat([1.0, 0.0], [80, 20])
    after = np.array([np.roll(before, -4)])
    found = retained(before, after, chance=0.25, pool="items")
    assert found.at(0.95) == found.interval
    assert found.at(0.99).low < found.interval.low < found.interval.high < found.at(0.99).high


def test_among_twenty_series_that_all_keep_just_ninety_percent_chance_confirms_at_its_level(tmp_path: Path) -> None:
    """Each series alone would be a holder in one of forty cases; that one of twenty is came in about four of ten."""
    (one,) = study(tmp_path, [run_of("memit", keeps(0.9), rungs=(1000,), benchmarks=(Planted(name="mmlu", kept=keeps(0.9), chance=0),))])
    (column,) = one.columns
    names = one.runs[0].outcomes[0, column].names
    random, repeats, confirmed = np.random.default_rng(7), 150, 0

    def drawn(place: int) -> Series:
        before = random.random(len(names)) < 0.8
        after = np.where(before, random.random(len(names)) < 0.88, random.random(len(names)) < 0.08)  # .72 of .8
        values = {0: before, 1000: after}
        outcomes = {(rung, column): Outcomes(names=names, values=found.astype(float)) for rung, found in values.items()}
        return replace(one, model=f"model{place}", runs=(replace(one.runs[0], outcomes=outcomes),))

    for _ in range(repeats):
        confirmed += thousands([drawn(place) for place in range(20)]).outcome == Outcome.CONFIRMED
    assert confirmed / repeats <= 0.07


# -- where efficacy is read --------------------------------------------------------------------------------------------------


def test_efficacy_is_read_where_ability_was_last_kept_or_where_it_is_first_lost(tmp_path: Path) -> None:
    there = {"efficacy": lambda n: 0.0 if n < 10 else 0.8}
    runs = [
        run_of("rome", lambda n: 0.5, rungs=(1, 10), **there),
        run_of("memit", lambda n: 1.0 if n < 1000 else 0.5, rungs=(10, 1000), **there),
        run_of("kn", keeps(0.9), rungs=(10, 1000), **there),
    ]
    found = verdict(study(tmp_path, runs), "F4.1a")
    cells = {row[1]: row[3:] for row in found.table[1:]}
    assert cells["rome"][0] == "0"
    assert cells["rome"][3:] == ("0.000 at 1", "no")
    assert cells["memit"][0] == "10"
    assert cells["memit"][3].endswith(" at 10")
    assert cells["memit"][4] == "yes"
    assert cells["kn"][3].endswith(" at 10")
