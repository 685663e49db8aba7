"""What a page over many runs makes of hostile texts, broken cells, unbounded intervals and runs that do not belong together."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from editeval.report.charts import Curve, Panel, Point
from editeval.report.drawing import scene
from editeval.report.scene import Area, Dots
from editeval.report.series import changes, series_of
from editeval.report.study import read_study, studies
from editeval.report.study_build import write_study
from editeval.report.study_tables import RUN_HEADS
from editeval.runner.results import ScoreStore
from editeval.types import EditevalError
from tests.report.synthetic import Planted, PlantedRun, falls_at, harness, keeps, perplexity, write_run

KNOWN = studies()
FALLING = (Planted(name="piqa", kept=falls_at(5), n=200),)


def page_of(folders: list[Path], to: Path) -> str:
    return write_study(folders, to).html.read_text()


def item_data(page: str) -> Mapping[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    data: Mapping[str, Any] = json.loads(found.group(1))
    return data


def change_config(folder: Path, group: str, **settings: Any) -> Path:
    """Write settings of a group into a run's manifest; group "" is the top."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    (manifest["config"][group] if group else manifest["config"]).update(settings)
    path.write_text(json.dumps(manifest))
    return folder


# -- the page --------------------------------------------------------------------------------------------------------------


def test_generated_text_cannot_open_a_comment_or_a_script_in_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path, PlantedRun(rungs=(1, 10), benchmarks=FALLING))
    (samples,) = (folder / "samples").glob("10-edit-quality*")
    hostile = gzip.decompress(samples.read_bytes()).decode().replace(" Rome", " <!-- <script>").replace(" Paris", " <!-- <script>")
    samples.write_bytes(gzip.compress(hostile.encode()))
    page = page_of([folder], tmp_path / "out")
    assert "<!-- <script>" not in page
    assert any("<!-- <script>" in item for item in item_data(page)["runs"][0]["items"])


def test_two_settings_of_one_data_set_are_filtered_by_the_names_that_the_filter_has(tmp_path: Path) -> None:
    run = PlantedRun(rungs=(1, 10), benchmarks=FALLING)
    folders = [change_config(write_run(tmp_path / name, run), "dataset", subset=name) for name in ("easyedit", "rome")]
    page = page_of(folders, tmp_path / "out")
    boxes = set(re.findall(r'name="dataset" value="([^"]*)"', page))
    assert boxes == {"counterfact (subset=easyedit)", "counterfact (subset=rome)"}
    assert {run["dataset"] for run in item_data(page)["runs"]} == boxes
    rows = re.findall(r'<tr data-model="tiny"[^>]*data-dataset="([^"]*)"', page)
    assert len(rows) > len(folders)  # of runs and of changes
    assert set(rows) == boxes


def cells_of_runs(page: str) -> list[list[str]]:
    table = page[page.index('id="run-table"') :].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr .*?</tr>", table)]


def test_ability_kept_names_its_number_of_edits_where_the_run_went_further(tmp_path: Path) -> None:
    runs = [PlantedRun(seed=seed, rungs=rungs, benchmarks=FALLING) for seed, rungs in enumerate([(1, 10, 100), (1, 10)])]
    further, other = cells_of_runs(page_of([write_run(tmp_path, run) for run in runs], tmp_path / "out"))
    place = RUN_HEADS.index("ability kept")
    assert (further[RUN_HEADS.index("edits")], other[RUN_HEADS.index("edits")]) == ("100", "10")
    assert further[place] == f"{other[place]} at 10"


# -- intervals without bounds ----------------------------------------------------------------------------------------------


def test_a_point_without_bounds_is_hollow_outside_the_band_and_said_to_have_none() -> None:
    points = (Point(0, 1.0, 0.9, 1.1), Point(10, 0.8, 0.7, 0.9), Point(100, 0.5, -math.inf, math.inf))
    panel = Panel(title="t", unit="u", curves=(Curve(label="rome", model="m", method="rome", dataset="d", points=points),))
    drawn = scene(panel)
    shapes = drawn.groups[1].shapes
    (band,) = [shape for shape in shapes if isinstance(shape, Area)]
    hollow, full = ([shape for shape in shapes if isinstance(shape, Dots) and shape.hollow == kind] for kind in (True, False))
    assert len(band.points) == 4
    assert [len(dots.points) for dots in (*hollow, *full)] == [1, 2]
    assert hollow[0].points[0][0] > max(x for x, _ in band.points)
    assert "0.500 (no bounds) at 100" in drawn.description
    assert "0.800 at 10" in drawn.description


def test_an_interval_without_bounds_has_empty_ends_in_the_table_of_a_chart(tmp_path: Path) -> None:
    planted = {seed: (Planted(name="piqa", kept=keeps(kept), base=0.5),) for seed, kept in enumerate((1.0, 0.2))}
    runs = [PlantedRun(seed=seed, rungs=(10,), benchmarks=benchmarks) for seed, benchmarks in planted.items()]
    files = write_study([write_run(tmp_path, run) for run in runs], tmp_path / "out")
    rows = list(csv.DictReader((files.figures / "rq1-tiny.csv").read_text().splitlines()))
    (after,) = [row for row in rows if row["panel"].startswith("mean") and row["x"] == "10"]
    assert 0 < float(after["y"]) < 1
    assert (after["low"], after["high"]) == ("", "")


# -- broken cells ----------------------------------------------------------------------------------------------------------


def test_a_score_that_is_no_number_is_a_broken_model_at_its_rung_and_leaves_the_other_rungs_alone(tmp_path: Path) -> None:
    benchmarks = tuple(Planted(name=name, kept=keeps(1.0), n=300) for name in ("mmlu", "piqa"))
    folders = [write_run(tmp_path, PlantedRun(seed=seed, benchmarks=benchmarks)) for seed in (0, 1)]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        broken = [
            row | {"value": None, "non_finite": {"value": "nan"}} if (row["num_edits"], row["benchmark"]) == (100, "mmlu") else row
            for row in rows
        ]
        (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    (one,) = series_of(read_study(folders, KNOWN), KNOWN)
    assert [column.benchmark for column in one.ability] == ["mmlu", "piqa"]
    assert {rung for rung in one.rungs if one.retained(rung, one.ability[0]) is not None} == {1, 10}
    assert {rung for rung in one.rungs if one.retained(rung, one.ability[1]) is not None} == {1, 10, 100}
    assert set(one.mean) == {1, 10}
    assert one.first_lost(0.9) == 100
    assert not any(change.rung == 100 and change.column.benchmark == "mmlu" for change in changes([one]))


def test_a_damaged_file_of_samples_costs_its_items_alone_and_is_named(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, PlantedRun(seed=seed, rungs=(1, 10), benchmarks=FALLING)) for seed in (0, 1)]
    (samples,) = (folders[0] / "samples").glob("10-piqa*")
    samples.write_bytes(samples.read_bytes()[:40])
    with pytest.raises(EditevalError, match=re.escape(str(samples))):
        ScoreStore(folders[0]).samples(10, "piqa")
    page = page_of(folders, tmp_path / "out")
    assert page.count("The items of piqa at 10 edits are left out") == 1
    assert samples.name in page
    (one,) = series_of(read_study(folders, KNOWN), KNOWN)
    assert set(one.mean) == {1, 10}  # from the scores


def test_where_all_counts_nothing_is_said_to_be_left_out(tmp_path: Path) -> None:
    assert 'id="left-out"' not in page_of([write_run(tmp_path, PlantedRun(rungs=(1, 10), benchmarks=FALLING))], tmp_path / "out")


# -- settings that differ --------------------------------------------------------------------------------------------------


def measure_again(folder: Path, run: PlantedRun, rungs: Sequence[int]) -> None:
    """Measure a run's benchmarks at some rungs once more, as a launch with other settings does."""
    store = ScoreStore(folder)
    for rung in rungs:
        for benchmark in run.benchmarks:
            digest = f"{run.name}-{rung}" if rung else f"weights-{run.model}"
            evaluation = harness(run, benchmark, rung)
            store.record(
                evaluation, benchmark=benchmark.name, benchmark_key=benchmark.key, num_edits=rung, state_digest=digest, seconds=1.0
            )


def test_a_rung_of_another_setting_than_the_unedited_models_is_left_out_and_said_so(tmp_path: Path) -> None:
    few, none = ((Planted(name="piqa", kept=keeps(1.0), n=300, base=base, shots=shots),) for base, shots in ((0.6, 5), (0.9, 0)))
    run = PlantedRun(rungs=(10, 100), benchmarks=few)
    folder = write_run(tmp_path, run)
    measure_again(folder, replace(run, benchmarks=none), rungs=(0, 100))
    (one,) = series_of(read_study([folder], KNOWN), KNOWN)
    assert {rung: kept.value for rung, kept in one.mean.items()} == {100: 1.0}
    assert one.first_lost(0.9) is None
    assert {change.rung for change in changes([one])} == {100}
    assert set(one.efficacy) == {0, 10, 100}  # what asks about the edits has another key at every rung
    assert "piqa at 10 edits is left out" in page_of([folder], tmp_path / "out")


def test_seeds_that_were_asked_other_items_are_not_averaged(tmp_path: Path) -> None:
    other = Planted(name="mmlu", kept=keeps(1.0), n=300)
    runs = [
        PlantedRun(seed=seed, benchmarks=(Planted(name="piqa", kept=keeps(1.0), n=n, base=base), other))
        for seed, (n, base) in enumerate([(300, 0.9), (200, 0.6)])
    ]
    folders = [write_run(tmp_path, run) for run in runs]
    (one,) = series_of(read_study(folders, KNOWN), KNOWN)
    assert [column.benchmark for column in one.ability] == ["mmlu"]
    assert {change.column.benchmark for change in changes([one])} == {"mmlu"}
    assert "piqa is left out: it was not measured with the same settings for every seed" in page_of(folders, tmp_path / "out")


def test_perplexities_of_other_passages_are_not_averaged(tmp_path: Path) -> None:
    runs = [PlantedRun(seed=seed, benchmarks=FALLING) for seed in (0, 1)]
    folders = [write_run(tmp_path, run) for run in runs]
    same = write_study(folders, tmp_path / "same").html.read_text()
    assert "perplexity is left out" not in same
    store = ScoreStore(folders[1])
    for rung in (0, *runs[1].rungs):
        digest = f"{runs[1].name}-{rung}" if rung else f"weights-{runs[1].model}"
        store.record(
            perplexity(runs[1], rung), benchmark="perplexity", benchmark_key="q" * 64, num_edits=rung, state_digest=digest, seconds=1.0
        )
    page = page_of(folders, tmp_path / "other")
    assert "perplexity is left out: it was not measured with the same settings for every seed" in page
    assert same.count("perplexity passage") > page.count("perplexity passage")


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [("model", "dtype", ("float32", "bfloat16")), ("model", "revision", ("main", "step1")), ("", "prompt_format", ("raw", "chat"))],
)
def test_runs_of_another_precision_revision_or_prompt_format_are_another_series(
    group: str, name: str, values: tuple[str, str], tmp_path: Path
) -> None:
    folders = [
        change_config(write_run(tmp_path / value, PlantedRun(seed=seed, benchmarks=FALLING)), group, **{name: value})
        for seed, value in enumerate(values)
    ]
    found = series_of(read_study(folders, KNOWN), KNOWN)
    assert {one.method for one in found} == {f"rome ({name}={value})" for value in values}
    alike = series_of(read_study(folders[:1], KNOWN), KNOWN)
    assert [one.method for one in alike] == ["rome"]


def test_a_second_run_of_a_seed_counts_nowhere_and_is_named(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, PlantedRun(benchmarks=FALLING)) for name in ("a", "b")]
    (one,) = series_of(read_study(folders, KNOWN), KNOWN)
    assert (len(one.runs), len(one.twins)) == (1, 1)
    page = page_of(folders, tmp_path / "out")
    assert f"{folders[1].as_posix()} is left out: {folders[0].as_posix()} has the same seed and is counted." in page
