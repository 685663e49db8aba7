"""What charts are made of, where the truth was planted."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from editeval.report.charts import Chart, Curve, Panel, Point, chart_csv
from editeval.report.drawing import scene
from editeval.report.findings import findings
from editeval.report.scene import Dots, Text
from editeval.report.series import series_of
from editeval.report.study import read_study, studies
from editeval.report.study_charts import charts
from tests.report.synthetic import Planted, PlantedRun, falls_at, keeps, write_run


def test_published_numbers_are_drawn_whatever_else_was_run_on_the_data_set(tmp_path: Path) -> None:
    gsm8k = Planted(name="gsm8k", kept=keeps(1.0), generated=True)
    folders = []
    for subset in ("easyedit", "rome"):
        folder = write_run(tmp_path / subset, PlantedRun(model="llama2-7b", benchmarks=(gsm8k,)))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["config"]["dataset"]["subset"] = subset
        (folder / "manifest.json").write_text(json.dumps(manifest))
        folders.append(folder)
    series = series_of(read_study(folders, studies()), studies())
    assert {one.dataset for one in series} == {"counterfact (subset=easyedit)", "counterfact (subset=rome)"}
    (chart,) = [chart for chart in charts(series, studies()) if chart.name == "rq1-llama2-7b"]
    assert any(curve.published for panel in chart.panels if isinstance(panel, Panel) for curve in panel.curves)


def test_pmet_is_shown_beside_memit_with_the_size_of_its_updates(tmp_path: Path) -> None:
    runs = [PlantedRun(method=method, benchmarks=(Planted(name="mmlu", kept=keeps(1.0)),)) for method in ("pmet", "memit", "rome")]
    known = studies()
    found = charts(series_of(read_study([write_run(tmp_path, run) for run in runs], known), known), known)
    (chart,) = [chart for chart in found if chart.question == "artefacts"]
    assert chart.name == "artefacts-tiny-pmet-memit"
    sizes = {panel.title: panel for panel in chart.panels if isinstance(panel, Panel)}["size of an edit's update"]
    assert {curve.method: [point.y for point in curve.points] for curve in sizes.curves} == {
        method: pytest.approx([0.25, 2.5, 25.0]) for method in ("pmet", "memit")
    }


def test_an_update_of_nothing_and_a_norm_that_is_no_number_have_no_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    runs = [PlantedRun(settings={"lr": rate}, benchmarks=(Planted(name="mmlu", kept=keeps(1.0)),)) for rate in (0.1, 0.5)]
    folders = [write_run(tmp_path, run) for run in runs]
    for folder in folders:
        edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
        edits[0]["diagnostics"]["update_norm"] = 0.0  # the fact was there already
        edits[-1]["weight_norm_ratio"] = {"non_finite": "inf"}
        (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    series = series_of(read_study(folders, studies()), studies())
    (chart,) = [chart for chart in charts(series, studies()) if chart.question == "artefacts"]
    panels = {panel.title: panel for panel in chart.panels if isinstance(panel, Panel)}
    for title, places in (("size of an edit's update", [10, 100]), ("norm of edited weights", [0, 1, 10])):
        assert [[point.x for point in curve.points] for curve in panels[title].curves] == [places] * 2


def test_forms_of_the_same_questions_stand_in_one_panel(tmp_path: Path) -> None:
    forms = (Planted(name="mmlu", kept=keeps(0.0)), Planted(name="mmlu-generative", kept=keeps(0.0), chance=0.0, generated=True))
    known = studies()
    found = charts(series_of(read_study([write_run(tmp_path, PlantedRun(benchmarks=forms))], known), known), known)
    (chart,) = [chart for chart in found if chart.question == "artefacts"]
    (panel,) = chart.panels
    assert isinstance(panel, Panel)
    last = {curve.label: curve.points[-1].y for curve in panel.curves}
    assert last["generative"] == 0
    assert 0.1 < last["likelihood"] < 0.45
    assert last["efficacy"] > 0.5
    assert ("chance", 0.25) in panel.levels


def test_safety_is_hollow_where_the_verdict_does_not_count_it(tmp_path: Path) -> None:
    planted = (*(Planted(name=name, kept=falls_at(50), n=1000) for name in ("mmlu", "piqa")), Planted(name="truthfulqa", kept=keeps(1.0)))
    known = studies()
    series = series_of(read_study([write_run(tmp_path, PlantedRun(benchmarks=planted))], known), known)
    (chart,) = [chart for chart in charts(series, known) if chart.question == "rq5"]
    (panel,) = [panel for panel in chart.panels if isinstance(panel, Panel) and panel.title.startswith("truthfulqa")]
    for curve in panel.curves:
        assert {point.x: point.counts for point in curve.points} == {0: True, 1: True, 10: True, 100: False}
    assert "does not count) at 100" in panel.description()
    hollow = [dots for group in scene(panel).groups for dots in group.shapes if isinstance(dots, Dots) and dots.hollow]
    assert [len(dots.points) for dots in hollow] == [1] * len(panel.curves)
    rows = [row for row in csv.DictReader(chart_csv(chart).splitlines()) if row["panel"] == panel.title]
    assert {row["x"]: row["counts"] for row in rows} == {"0": "yes", "1": "yes", "10": "yes", "100": "no"}


def test_monitors_are_means_over_all_orders_with_their_interval(tmp_path: Path) -> None:
    known = studies()
    planted = (Planted(name="mmlu", kept=falls_at(50)),)
    folders = [write_run(tmp_path, PlantedRun(seed=seed, rungs=(1, 10, 100)[: 3 - seed], benchmarks=planted)) for seed in (0, 1)]
    edits = folders[0] / "edits.jsonl"
    edits.write_text(edits.read_text().replace('"weight_norm_ratio": 1.2', '"weight_norm_ratio": 4.8'))
    (one,) = series_of(read_study(folders, known), known)
    (chart,) = [chart for chart in charts((one,), known) if chart.question == "monitors"]
    panels = {panel.title: panel for panel in chart.panels if isinstance(panel, Panel)}
    (norm,) = panels["norm of edited weights"].curves
    assert [point.x for point in norm.points] == [0, 1, 10]  # the second order has no more
    assert norm.points[-1].y == pytest.approx((1.2 * 4.8) ** 0.5)
    assert norm.points[-1].low < 1.2 < 4.8 < norm.points[-1].high
    (perplexity,) = panels["perplexity passage"].curves
    assert [point.x for point in perplexity.points] == [0, 1, 10]
    assert all(point.low < point.y < point.high for point in perplexity.points)
    (broken,) = panels["commonest choice"].curves
    assert [point.x for point in broken.points] == [0, 1, 10]
    rows = [row for row in csv.DictReader(chart_csv(chart).splitlines()) if row["panel"] == "norm of edited weights"]
    assert (rows[0]["low"], rows[0]["high"]) == ("", "")  # of the unedited model it is known


def charts_of(tmp_path: Path, runs: list[PlantedRun]) -> dict[str, Chart]:
    known = studies()
    return {chart.name: chart for chart in charts(series_of(read_study([write_run(tmp_path, run) for run in runs], known), known), known)}


def test_published_numbers_stand_beside_sizes_and_siblings_with_their_doubts(tmp_path: Path) -> None:
    gsm8k = (Planted(name="gsm8k", kept=falls_at(20), generated=True),)
    models = ("pythia-160m", "pythia-1b", "llama2-7b", "llama2-7b-chat")
    found = charts_of(
        tmp_path, [PlantedRun(model=model, method=method, benchmarks=gsm8k) for model in models for method in ("rome", "mend")]
    )

    sizes = {panel.title: panel for panel in found["rq3-pythia"].panels if isinstance(panel, Panel)}
    panel = sizes["gsm8k (generative) after 10"]
    printed = {curve.method: curve for curve in panel.curves if curve.published}
    assert [point.x for point in printed["rome"].points] == [160e6, 1e9]
    assert {point.y for curve in panel.curves if not curve.published for point in curve.points} != {
        point.y for point in printed["rome"].points
    }
    assert not any(curve.published for curve in sizes["mean ability after 10"].curves)

    siblings = found["rq2-llama-2-7b"]
    panel = next(panel for panel in siblings.panels if isinstance(panel, Panel) and panel.title.startswith("gsm8k"))
    assert {(curve.model, curve.dashed) for curve in panel.curves if curve.published} == {("llama2-7b", False), ("llama2-7b-chat", True)}
    assert "not ours" in siblings.caption
    assert siblings.caption.count("Published numbers of mend: the published MEND code does not accumulate edits.") == 1


def test_none_right_of_twenty_is_no_certain_zero(tmp_path: Path) -> None:
    twenty = (Planted(name="gsm8k", kept=keeps(0.0), generated=True, n=20, chance=0.0),)
    found = charts_of(tmp_path, [PlantedRun(benchmarks=twenty, seed=seed) for seed in (0, 1)])
    panel = next(panel for panel in found["rq1-tiny"].panels if isinstance(panel, Panel) and panel.title.startswith("gsm8k"))
    ends = [(point.y, point.low, point.high) for curve in panel.curves for point in curve.points if point.x == 100]
    assert len(ends) == 3  # each order, and both together
    for value, low, high in ends:
        assert (value, low) == (0, 0)
        assert high == pytest.approx(0.161, abs=0.001)  # Wilson's for 0 of 20


def test_a_published_setting_of_kn_is_named_and_keeps_its_vote(tmp_path: Path) -> None:
    runs = [
        PlantedRun(method="kn", settings={"steps": steps, "refine": refine}, benchmarks=(Planted(name="mmlu", kept=falls_at(5)),))
        for steps, refine in ((1, False), (20, False), (1, True))
    ]
    known = studies()
    series = series_of(read_study([write_run(tmp_path, run) for run in runs], known), known)
    (chart,) = [chart for chart in charts(series, known) if chart.question == "artefacts"]
    mean = next(panel for panel in chart.panels if isinstance(panel, Panel) and panel.title.startswith("mean ability"))
    assert {curve.label for curve in mean.curves} == {"published code", "False, 20", "True, 1"}
    assert "published code: kn (refine=False, steps=1), as it was run with steps 1, refine False." in chart.caption
    assert "reproduces its fault" not in chart.caption
    assert not any(one.reproduces_a_fault for one in series)
    assert len(next(found for found in findings(series, known) if found.key == "F4.1a").table) == 4


def test_published_settings_that_all_curves_have_tell_none_of_them_apart(tmp_path: Path) -> None:
    shared = {"steps": 1, "refine": False}
    planted = (Planted(name="mmlu", kept=falls_at(5)),)
    runs = [PlantedRun(method="kn", settings={**shared, "add": value}, benchmarks=planted) for value in (1, 8)]
    runs.append(PlantedRun(method="kn", settings={"steps": 20, "refine": False, "add": 1}, benchmarks=planted))
    known = studies()

    def labels(mine: list[PlantedRun]) -> set[str]:
        found = charts(series_of(read_study([tmp_path / run.name for run in mine], known), known), known)
        (chart,) = [chart for chart in found if chart.question == "artefacts"]
        return {curve.label for panel in chart.panels if isinstance(panel, Panel) for curve in panel.curves}

    for run in runs:
        write_run(tmp_path, run)
    assert labels(runs[:2]) == {"1", "8"}
    assert labels(runs) == {"published code, 1", "published code, 8", "1, 20"}


@pytest.mark.parametrize(
    ("edits", "values", "numbers"),
    [
        (range(0, 101), (3.1, 29.0), ["0", "1", "5", "10", "20", "50", "100", "5", "10", "20"]),
        ((0, 10, 97), (0.9, 20_000.0), ["0", "10", "97", "1", "10", "100", "1000", "10000"]),
        (range(0, 101), (1.0, 1.1), ["0", "1", "5", "10", "20", "50", "100", "1", "1.5"]),
    ],
)
def test_the_numbers_at_an_axis_are_those_that_were_measured_or_round(
    edits: Sequence[int], values: tuple[float, float], numbers: list[str]
) -> None:
    low, high = values
    points = tuple(Point(x, y, y, y) for x in edits for y in [low if x < edits[-1] else high])
    curve = Curve(label="curve", model="m", method="m", dataset="d", points=points)
    panel = Panel(title="norm", unit="times", curves=(curve,), share=False, log=True)
    told = [shape.text for group in scene(panel).groups for shape in group.shapes if isinstance(shape, Text)]
    assert sorted(text for text in told if text[0].isdigit()) == sorted(numbers)
