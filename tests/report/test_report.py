"""The report: from disk alone, complete, self-contained, the same every time."""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from editeval.interfaces import RunState
from editeval.report.answers import answers
from editeval.report.build import WriteReport, run_report, write_report
from editeval.report.figures import PAGE, curves_figure, png, spread, svg
from editeval.report.panels import LOG_PROBABILITY, SHARE, overview, panels
from editeval.report.table import table_csv, table_markdown
from editeval.runner.results import ScoreStore
from editeval.runner.retention import retention
from editeval.runner.run_files import append_edit, write_manifest
from editeval.runner.table import MANY_TASKS, headline, score_table
from editeval.types import EditevalError, Evaluation, Measurement, Score

RUNGS = (0, 1, 5, 10)
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def sample(rung: int, position: int, metric: str, outcome: float) -> dict[str, Any]:
    return {
        "request_id": f"fact-{position}",
        "position": position,
        "metric": metric,
        "prompts": [f"Question {position}"],
        "expected": [HOSTILE],
        "generated": [f" answer {rung}.{position}"],
        "outcomes": {"generation": [outcome], "probability": [None]},
    }


def edit_quality(rung: int) -> Evaluation:
    gained = 0.0 if rung == 0 else 1 - rung / 100
    measurements = [
        Measurement(task="facts", metric="efficacy", protocol="probability", value=gained, n=10, stderr=0.01, chance=0.5),
        Measurement(task="facts", metric="efficacy_log_prob", protocol="probability", value=-9.5 + gained, n=10, stderr=0.2),
        Measurement(task="facts", metric="efficacy", protocol="generation", value=gained, n=10, stderr=0.01),
        Measurement(task="facts", metric="locality", protocol="generation", value=1 - rung / 50, n=10, stderr=0.05),
    ]
    facts = range(1, (rung or RUNGS[-1]) + 1)
    samples = [
        sample(rung, position, metric, float(rung > 0 and position != 3)) for position in facts for metric in ("efficacy", "locality")
    ]
    return Evaluation(measurements=tuple(measurements), samples=tuple(samples))


def quick(rung: int) -> Evaluation:
    measurements = [
        Measurement(task="reading", metric="acc_norm", protocol="cloze", value=0.625 - rung / 100, n=60, stderr=0.06, chance=0.25),
        Measurement(task="arithmetic", metric="acc_norm", protocol="cloze", value=0.26, n=60, stderr=0.06, chance=0.25),
        Measurement(
            task="perplexity",
            metric="perplexity",
            protocol="rolling",
            value=math.inf if rung == 10 else 30.0 + rung,
            n=1,
            higher_is_better=False,
        ),
    ]
    return Evaluation(measurements=tuple(measurements))


def make_run(run_dir: Path, rungs: Sequence[int] = RUNGS) -> tuple[Score, ...]:
    store = ScoreStore(run_dir)
    for rung in rungs:
        digest = f"d{rung}" if rung else "weights"
        for name, key, evaluation in (("edit-quality", f"{rung:064d}", edit_quality(rung)), ("quick", "q" * 64, quick(rung))):
            store.record(evaluation, benchmark=name, benchmark_key=key, num_edits=rung, state_digest=digest, seconds=1.5)
    config = {"model": {"name": "tiny"}, "method": {"name": "rome", "layer": 5}, "dataset": {"name": "facts"}}
    write_manifest(run_dir, {"edit_key": "e" * 64, "model_fingerprint": "weights", "config": config, "command": [HOSTILE]})
    for step in range(1, max(rungs) + 1):
        row = {"step": step, "num_edits": step, "request_ids": [f"fact-{step}"], "seconds": 1.5, "digest": f"d{step}"}
        append_edit(run_dir, {**row, "weights_digest": "w", "replayed": False, "diagnostics": {"loss": 0.25}, "weight_norm_ratio": 1.5})
    return store.scores()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def html_page(run_dir: Path) -> str:
    return run_report(run_dir).html.read_text()


class PageReader(HTMLParser):
    """Collects what a page is made of, and checks that its elements are nested properly."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# -- page ------------------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_asks_the_network_for_nothing(html_page: str) -> None:
    reader = PageReader(html_page)
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "poster"):
                assert (value or "").startswith(("#", "data:")), f"<{tag} {name}={value}>"
    style = re.sub(r"<svg.*?</svg>", "", html_page, flags=re.DOTALL)
    assert "@import" not in style
    assert not re.search(r"url\((?!#|data:)", html_page)


def test_text_from_a_run_cannot_become_markup(html_page: str) -> None:
    assert "<script>" not in html_page
    assert "&lt;script&gt;" in html_page


def test_every_figure_has_a_text_alternative_with_its_numbers(html_page: str) -> None:
    labels = [attributes.get("aria-label") for tag, attributes in PageReader(html_page).tags if tag == "svg"]
    assert len(labels) == 7  # shares by generation and by probability, log-probability, quick, perplexity; two matrices
    assert all(labels)
    assert any("reading: unedited 0.625, 1 edit 0.615, 5 edits 0.575, 10 edits 0.525 (chance 0.250)" in (label or "") for label in labels)
    assert any("at 10 edits 9 of 10" in (label or "") for label in labels)


def test_ids_on_the_page_are_unique_and_links_lead_somewhere(html_page: str) -> None:
    tags = PageReader(html_page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [str(attributes["href"]) for tag, attributes in tags if tag == "a"]
    assert anchors
    used = {anchor.removeprefix("#") for anchor in anchors} | set(re.findall(r"url\(#([^)]+)\)", html_page))
    used |= {str(attributes["xlink:href"]).removeprefix("#") for tag, attributes in tags if tag == "use"}
    assert used <= set(ids)


def test_page_shows_numbers_settings_timings_and_generated_answers(html_page: str) -> None:
    text = " ".join(PageReader(html_page).text)
    for expected in (
        "tiny · rome · facts",
        "0.525",
        "inf",
        "answer 0.1",
        "answer 10.1",
        "edit_key",
        "&quot;layer&quot;".replace("&quot;", '"'),
    ):
        assert expected in text


def test_page_serves_light_and_dark_with_the_same_figures(html_page: str) -> None:
    assert "prefers-color-scheme: dark" in html_page
    assert "var(--ink)" in html_page
    assert PAGE.ink not in html_page
    assert PAGE.muted not in html_page


def test_the_same_run_gives_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    copied = tmp_path / run_dir.name
    shutil.copytree(run_dir, copied)
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (run_report(run_dir).html.parent, run_report(copied).html.parent)
    )
    assert first == second
    assert len(first) > 4


def test_every_figure_of_the_page_is_there_as_picture_drawing_and_numbers(run_dir: Path, html_page: str) -> None:
    folder = run_report(run_dir).figures
    assert folder is not None
    labels = [attributes.get("aria-label") for tag, attributes in PageReader(html_page).tags if tag == "svg"]
    names = {path.stem for path in folder.iterdir()}
    assert names == {
        "edit-quality-generation-share-correct",
        "edit-quality-probability-share-correct",
        "edit-quality-probability-log-probability-nats",
        "quick-cloze-share-correct",
        "quick-rolling-perplexity-lower-is-better",
        "retention-efficacy-generation",
        "retention-locality-generation",
    }
    assert len(names) == len(labels)
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] > 300
        drawing = (folder / f"{name}.svg").read_text()
        ElementTree.fromstring(drawing)
        assert "var(--" not in drawing  # colours of the page, which a file has not
    curves, matrix = (
        list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        for name in ("quick-cloze-share-correct", "retention-efficacy-generation")
    )
    assert [row["quick/reading.acc_norm.cloze"] for row in curves] == ["0.25", "0.625", "0.615", "0.575", "0.525"]
    assert [row["after 5"] for row in matrix] == ["1.0", "1.0", "0.0", "1.0", "1.0", "", "", "", "", ""]


def test_report_leaves_out_scores_of_states_that_no_longer_stand(tmp_path: Path) -> None:
    make_run(tmp_path)
    stale = Evaluation(measurements=(Measurement(task="reading", metric="acc_norm", protocol="cloze", value=0.999, n=60),))
    ScoreStore(tmp_path).record(stale, benchmark="quick", benchmark_key="q" * 64, num_edits=5, state_digest="other", seconds=1)
    assert "0.999" not in run_report(tmp_path).csv.read_text()


def test_a_run_of_only_the_unedited_model_has_a_report(tmp_path: Path) -> None:
    make_run(tmp_path, rungs=(0,))
    assert "unedited" in run_report(tmp_path).html.read_text()


def test_an_unmeasured_run_says_what_to_do(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"edit_key": "e", "model_fingerprint": "s", "config": {}})
    with pytest.raises(EditevalError, match="nothing is measured"):
        run_report(tmp_path)


def test_the_callback_writes_the_report_of_the_scores_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = make_run(tmp_path)
    state = RunState(
        run_dir=str(tmp_path),
        edit_key="e" * 64,
        model_name="tiny",
        method_name="rome",
        dataset_name="facts",
        rungs=(0, 1),
        num_edits=1,
        state_digest="d1",
        config={},
    )
    WriteReport().on_run_end(state, [score for score in scores if score.num_edits <= 1])
    rows = (tmp_path / "report" / "table.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["num_edits", "chance", "0", "1"]
    assert str(tmp_path / "report" / "report.html") in capsys.readouterr().out


# -- tables ----------------------------------------------------------------------------------------------------------------


def test_csv_table_has_unrounded_numbers_chance_and_every_rung(run_dir: Path) -> None:
    rows = list(csv.reader(table_csv(score_table(ScoreStore(run_dir).scores())).splitlines()))
    place = rows[0].index("quick/reading.acc_norm.cloze")
    assert [(row[0], row[place]) for row in rows[1:]] == [
        ("chance", "0.25"),
        ("0", "0.625"),
        ("1", "0.615"),
        ("5", "0.575"),
        ("10", "0.525"),
    ]


def test_markdown_table_marks_what_is_at_chance(run_dir: Path) -> None:
    text = table_markdown(score_table(ScoreStore(run_dir).scores()))
    assert "| quick | reading acc_norm (cloze) | arithmetic acc_norm* (cloze) |" in text
    assert "| 10 edits | 0.525 | 0.260 | inf |" in text


def test_efficacy_below_chance_before_editing_is_not_marked(run_dir: Path) -> None:
    table = score_table(ScoreStore(run_dir).scores())
    assert [column.task for column in table.columns if table.at_chance(column)] == ["arithmetic"]


def test_two_settings_of_a_benchmark_are_never_one_column(tmp_path: Path) -> None:
    make_run(tmp_path)
    before = ScoreStore(tmp_path).scores()
    other = ScoreStore(tmp_path).record(quick(0), benchmark="quick", benchmark_key="r" * 64, num_edits=0, state_digest="weights", seconds=1)
    table = score_table([*before, *other])
    assert table.benchmarks() == ("edit-quality", "quick #qqqq", "quick #rrrr")
    assert len(table.columns) == 4 + 3 + 3, "a key that differs between rungs only names their requests: one column"


def test_the_parts_of_a_large_benchmark_are_left_out_of_the_overview_only() -> None:
    def score(task: str) -> Score:
        return Score(
            benchmark="mmlu",
            task=task,
            metric="acc",
            protocol="likelihood",
            value=0.5,
            n=1,
            num_edits=0,
            state_digest="d",
            benchmark_key="k",
            seconds=1,
        )

    many = score_table([score("mmlu"), *(score(f"mmlu_{part}") for part in range(MANY_TASKS))])
    assert [column.task for column in headline(many).columns] == ["mmlu"]
    few = score_table([score("mmlu"), score("mmlu_law")])
    assert headline(few).columns == few.columns


# -- panels and figures ----------------------------------------------------------------------------------------------------


def test_a_panel_never_mixes_protocols_or_units(run_dir: Path) -> None:
    made = panels(score_table(ScoreStore(run_dir).scores()))
    assert [(panel.title, panel.unit, len(panel.columns)) for panel in made] == [
        ("edit-quality (probability)", SHARE, 1),
        ("edit-quality (probability)", LOG_PROBABILITY, 1),
        ("edit-quality (generation)", SHARE, 2),
        ("quick (cloze)", SHARE, 2),
        ("quick (rolling)", "perplexity (lower is better)", 1),
    ]
    assert [panel.title for panel in overview(made)] == ["edit-quality (generation)", "quick (cloze)", "quick (rolling)"]


def test_curves_reach_every_finite_number_and_name_themselves(run_dir: Path) -> None:
    made = panels(score_table(ScoreStore(run_dir).scores()))
    for panel in made:
        (axis,) = curves_figure([panel]).axes
        low, high = axis.get_ylim()
        for rung in RUNGS:
            for column in panel.columns:
                value = panel.table.value(rung, column)
                assert value is not None
                assert low <= value <= high or math.isinf(value)
        written = {text.get_text() for text in axis.texts}
        assert {panel.label(column) for column in panel.columns} <= {text.rstrip("*") for text in written}
        assert ("chance 0.25" in written) == any(panel.table.chance(column) == 0.25 for column in panel.columns)


def test_labels_at_the_ends_keep_their_distance_and_their_order() -> None:
    assert spread([0.1, 0.5, 0.9], gap=0.1) == pytest.approx([0.1, 0.5, 0.9])
    moved = spread([0.5, 0.5, 0.52, 0.9], gap=0.1)
    assert all(later - earlier >= 0.1 - 1e-12 for earlier, later in pairwise(moved))
    assert sum(moved[:3]) / 3 == pytest.approx((0.5 + 0.5 + 0.52) / 3), "the group stays where it was"
    assert spread([], gap=0.1) == []


def test_svg_is_deterministic_xml_whose_ids_come_from_the_salt(run_dir: Path) -> None:
    panel = panels(score_table(ScoreStore(run_dir).scores()))[0]
    one, again, other = (svg(curves_figure([panel], theme=PAGE), salt=salt) for salt in ("a", "a", "b"))
    assert one == again
    ElementTree.fromstring(one)
    shared = set(re.findall(r'id="(m[0-9a-f]+|p[0-9a-f]+)"', one)) & set(re.findall(r'id="(m[0-9a-f]+|p[0-9a-f]+)"', other))
    assert not shared
    assert png(curves_figure([panel])) == png(curves_figure([panel]))


# -- retention and answers -------------------------------------------------------------------------------------------------


def test_retention_follows_each_fact_over_the_rungs_and_leaves_the_unasked_blank(run_dir: Path) -> None:
    store = ScoreStore(run_dir)
    samples = {rung: store.samples(rung, "edit-quality") for rung in RUNGS}
    matrix = retention(samples, metric="efficacy", protocol="generation")
    assert matrix is not None
    assert matrix.rungs == RUNGS
    assert matrix.positions == tuple(range(1, 11))
    assert matrix.values[0] == (0.0, 1.0, 1.0, 1.0)
    assert matrix.values[2] == (0.0, None, 0.0, 0.0)
    assert matrix.values[9] == (0.0, None, None, 1.0)
    assert retention(samples, metric="efficacy", protocol="probability") is None


def test_answers_pair_the_unedited_with_the_last_state_and_spread_over_the_facts(run_dir: Path) -> None:
    store = ScoreStore(run_dir)
    shown = answers({rung: store.samples(rung, "edit-quality") for rung in RUNGS}, metric="efficacy", limit=5)
    assert [(answer.unedited, answer.edited, answer.passed) for answer in shown] == [
        ("answer 0.1", "answer 10.1", True),
        ("answer 0.3", "answer 10.3", False),
        ("answer 0.5", "answer 10.5", True),
        ("answer 0.7", "answer 10.7", True),
        ("answer 0.9", "answer 10.9", True),
    ]


def test_a_report_goes_where_it_is_sent(run_dir: Path, tmp_path: Path) -> None:
    files = write_report(run_dir, ScoreStore(run_dir).scores(), {}, to=tmp_path / "elsewhere")
    assert {path.parent for path in (files.png, files.html, files.csv, files.markdown)} == {tmp_path / "elsewhere"}
    assert files.png.read_bytes().startswith(b"\x89PNG")
