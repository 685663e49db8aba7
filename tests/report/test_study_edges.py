"""What a page over many runs makes of hostile texts, broken cells, unbounded intervals and runs that do not belong together."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editeval.report.study_build import write_study
from tests.report.synthetic import Planted, PlantedRun, falls_at, write_run

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
