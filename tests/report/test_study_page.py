"""The page over many runs: complete, self-contained, and at work in a browser."""

from __future__ import annotations

import csv
import hashlib
import html
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from editeval.__main__ import main
from editeval.files import append_jsonl
from editeval.report import drawing, study_page
from editeval.report.charts import Curve, Panel, Point, chart_csv
from editeval.report.drawing import scene
from editeval.report.published import FOLDER, published_curve, published_evaluating, published_scores, published_seconds
from editeval.report.scene import png, svg
from editeval.report.series import series_of
from editeval.report.study import read_study, studies
from editeval.report.study_build import StudyFiles, write_study
from editeval.report.study_charts import charts
from editeval.report.study_tables import QUESTIONS, RUN_HEADS
from editeval.runner.results import ScoreStore
from editeval.runner.table import Column, format_number
from tests.report.browser import CHROMIUM, Page
from tests.report.synthetic import Planted, PlantedRun, falls_at, keeps, write_run, write_study_runs
from tests.report.test_report import PageReader
from tests.report.test_study_edges import item_data

HOSTILE = "</script><img src=x onerror=alert(1)>"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study_runs(tmp_path_factory.mktemp("runs"), methods=("rome", "memit", HOSTILE))


@pytest.fixture(scope="module")
def files(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> StudyFiles:
    return write_study(folders, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(files: StudyFiles) -> str:
    return files.html.read_text()


# -- from disk -------------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(page: str) -> None:
    reader = PageReader(page)
    assert reader.open == []
    addresses = [value for _, attributes in reader.tags for name, value in attributes.items() if name in ("src", "href") and value]
    assert all(re.match(r"#|data:,|figures/|\.\./", address) for address in addresses), addresses
    assert "@import" not in page
    assert HOSTILE not in page


def section_of(page: str, name: str) -> str:
    found = re.search(rf'<section aria-labelledby="{name}">.*?</section>', page, flags=re.DOTALL)
    assert found is not None, name
    return found.group(0)


def words_of(markup: str) -> str:
    """Return what of a piece of the page is read."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def charts_of(markup: str) -> dict[str, list[str]]:
    """Return the figures of every chart, by its name."""
    blocks = re.findall(r'<details class="chart".*?</details>', markup, flags=re.DOTALL)
    names = [re.findall(r'href="figures/([\w.-]+)\.csv"', block) for block in blocks]
    return {name: re.findall(r"<figure.*?</figure>", block, flags=re.DOTALL) for (name,), block in zip(names, blocks, strict=True)}


def label_of(figure: str) -> str:
    found = re.match(r'<figure[^>]*><svg [^>]*role="img" aria-label="([^"]*)"', figure)
    assert found is not None, figure[:200]
    return html.unescape(found.group(1))


def rows_of(files: StudyFiles, chart: str) -> list[dict[str, str]]:
    return list(csv.DictReader((files.figures / f"{chart}.csv").read_text().splitlines()))


def test_every_figure_tells_its_curves_and_their_numbers_in_words(page: str, files: StudyFiles) -> None:
    found = charts_of(page)
    assert set(found) == {path.stem for path in files.figures.iterdir()}
    assert page.count("<svg") == page.count("<figure") == sum(map(len, found.values())) > 50
    for chart, figures in found.items():
        rows = rows_of(files, chart)
        titles = list(dict.fromkeys(row["panel"] for row in rows))
        for title, figure in zip(titles, figures, strict=True):
            label = label_of(figure)
            assert label.startswith(title)
            for row in rows:
                if row["panel"] == title and row["seed"] == "all":
                    number = f"{re.escape(format_number(float(row['y'])))}( \\([a-z ]+\\))* (at|after) {re.escape(row['x'])}\\b"
                    assert re.search(f"{re.escape(row['curve'])}( \\(published\\))?: [^;]*{number}", label), (label, row)


def test_edit_quality_stands_beside_ability_in_every_chart(page: str) -> None:
    for question in (*QUESTIONS, "artefacts", "monitors"):
        charts = charts_of(section_of(page, question))
        assert charts, f"{question} has no chart here, so nothing is seen of it"
        for chart, figures in charts.items():
            labels = [label_of(figure) for figure in figures]
            quality = [figure.startswith('<figure class="quality">') for figure in figures]
            if question == "rq4":  # a panel a method: efficacy is a curve of each
                assert all("efficacy: " in label for label in labels), chart
                continue
            assert quality == [label.startswith(("efficacy", "locality")) for label in labels], chart
            assert any(quality), chart
            if question == "rq3":  # for each number of edits: efficacy, the mean of abilities, each of them
                numbers = [re.findall(r"after (\d+)", label)[0] for label in labels]
                each = len(labels) // 2
                assert (numbers, quality) == (["1"] * each + ["10"] * each, [True, *[False] * (each - 1)] * 2)
                assert each > 2


def test_the_caption_of_rq4_says_what_each_of_its_benchmarks_asks(page: str, files: StudyFiles) -> None:
    told = html.unescape(section_of(page, "rq4"))
    asked = {name for names in re.findall(r"\(([^)]*)\)", re.findall(r"Asked: (.*?)\. Left out", told)[0]) for name in names.split(", ")}
    with (files.figures / "rq4-llama2-7b.csv").open(newline="") as file:
        curves = {row["curve"] for row in csv.DictReader(file)}
    assert curves == asked | {"efficacy"}
    assert "world knowledge (mmlu" in told


def test_every_verdict_stands_with_its_statement_and_its_reason_in_the_table_and_at_its_question(page: str, files: StudyFiles) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", section_of(page, "verdicts").split("<tbody>")[1], flags=re.DOTALL)
    told = [[words_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    assert told == [[f"{QUESTIONS[one.question][0]} {one.key}", one.statement, one.outcome, one.reason] for one in files.verdicts]
    assert {verdict.question for verdict in files.verdicts} == set(QUESTIONS)
    for row, verdict in zip(rows, files.verdicts, strict=True):
        assert verdict.statement
        assert verdict.reason
        badge = f'<span class="badge {verdict.outcome.lower()}">{verdict.outcome}</span>'
        assert badge in row
        paragraphs = re.findall(r"<p>.*?</p>", section_of(page, verdict.question), flags=re.DOTALL)
        (mine,) = [paragraph for paragraph in paragraphs if f"<strong>{verdict.key}</strong>" in paragraph]
        assert badge in mine
        assert words_of(mine) == f"{verdict.key} {verdict.statement} {verdict.outcome}{verdict.reason}"


def test_every_figure_is_there_as_picture_drawing_and_numbers(files: StudyFiles) -> None:
    names = {path.stem for path in files.figures.iterdir()}
    of_models = {f"{kind}-llama2-7b" for kind in ("rq1", "rq4", "rq5", "retention", "monitors")}
    assert {"rq2-llama-2-7b", "rq3-llama-2", "artefacts-llama2-7b-mend", *of_models} <= names
    for name in names:
        with Image.open(files.figures / f"{name}.png") as picture:
            assert picture.size[0] > 300
        ElementTree.fromstring((files.figures / f"{name}.svg").read_text())
        rows = list(csv.DictReader((files.figures / f"{name}.csv").read_text().splitlines()))
        assert rows
        assert {row["source"] for row in rows} <= {"measured", "published"}


def test_the_same_runs_give_the_same_files(files: StudyFiles, folders: list[Path], tmp_path: Path) -> None:
    again = write_study(folders, tmp_path / "a" / "b")
    for path in files.figures.iterdir():
        assert (again.figures / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_command_reports_many_runs_on_one_page(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, folders[:2]), "--to", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "F4.1a" in said
    assert (tmp_path / "out" / "report.html").exists()


def test_a_page_over_runs_that_are_named_leaves_the_first_ones_own_page(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders[:2]]
    assert main(["report", str(runs[0])]) == 0
    own = (runs[0] / "report" / "report.html").read_bytes()
    assert main(["report", *map(str, runs)]) == 0
    assert (runs[0] / "report" / "report.html").read_bytes() == own
    assert str(runs[0] / "study" / "report.html") in capsys.readouterr().out


# -- published numbers -----------------------------------------------------------------------------------------------------


def test_published_rows_are_the_papers_and_their_doubts_are_noted() -> None:
    rows = {(row.table, row.model, row.method, row.num_edits, row.benchmark): row for row in published_scores()}
    assert len(rows) == len(published_scores()) == 930
    assert rows["Table 2", "llama2-7b", "rome", 50, "mmlu"].value == 0.2701
    assert rows["Table 5", "mistral-7b", "rome", 100, "toxigen"].value == 0.5667
    assert "probably .0886" in rows["Table 2", "llama2-7b", "grace", 20, "gsm8k"].doubt
    assert "base model's row" in rows["Table 3", "llama2-7b-chat", "rome", 50, "mmlu"].doubt
    assert published_seconds()["llama2-7b", "memit"] == pytest.approx(24.14)
    assert published_evaluating()["llama2-7b", "mmlu"] == (103, 840)


def test_published_rows_stay_as_they_were_compared_with_the_print() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.csv")}
    assert found == {  # the 854 numbers of Tables 2 to 5 were compared one by one with a second reading of the print
        "scores.csv": "609a52ea0afaf2346519af215f6d1de183ffec768606e91047da2e5891456692",
        "evaluating.csv": "ff0eccfba2af8f77d06876f11d36029fdd99a7a23a7f5d4abd3c38a2f80fec67",
        "seconds.csv": "5d743f2b2d960be59d92a7d18ae98ac19d703f9039bbfc7054e3422ce3e71c9a",
    }


def test_a_published_curve_is_only_for_the_same_cell() -> None:
    gsm8k = Column(benchmark="gsm8k", task="gsm8k_cot", metric="exact_match_strict_match", protocol="generative")
    found = published_curve("llama2-7b", "rome", "counterfact", gsm8k)
    assert [row.num_edits for row in found] == [0, 1, 5, 10, 20, 50, 100]
    assert not published_curve("llama2-7b", "rome", "counterfact", gsm8k._replace(protocol="likelihood"))
    assert not published_curve("llama2-7b", "rome", "zsre", gsm8k)
    assert not published_curve("smollm2-135m", "rome", "counterfact", gsm8k)
    mc1 = Column(benchmark="truthfulqa", task="truthfulqa_mc1", metric="acc", protocol="likelihood")
    raw = Column(benchmark="toxigen", task="toxigen", metric="acc", protocol="likelihood")
    for column, other in ((mc1, mc1._replace(task="truthfulqa_mc2")), (raw, raw._replace(metric="balanced_accuracy"))):
        assert published_curve("llama2-7b", "rome", "counterfact", column)
        assert not published_curve("llama2-7b", "rome", "counterfact", other)


def test_published_numbers_are_drawn_apart_and_never_averaged_with_ours(folders: list[Path]) -> None:
    known = studies()
    series = series_of(read_study(folders[:6], known), known)
    chart = next(chart for chart in charts(series, known) if chart.name == "rq1-llama2-7b")
    panel = next(panel for panel in chart.panels if isinstance(panel, Panel) and panel.title.startswith("gsm8k"))
    published = [curve for curve in panel.curves if curve.published]
    assert {curve.method for curve in published} == {"rome", "memit"}
    ours = next(curve for curve in panel.curves if curve.method == "rome" and curve.seed is None and not curve.published)
    column = next(column for column in series[0].columns if column.benchmark == "gsm8k")
    rome = next(one for one in series if one.method == "rome")
    assert ours.points[0].y == pytest.approx(sum(run.table.cells[(0, column)].value for run in rome.runs) / 2)
    assert "published" in chart_csv(chart)


def test_settings_of_one_method_are_compared_in_one_chart(tmp_path: Path) -> None:
    planted = {True: falls_at(5), False: keeps(1.0)}  # all edits in the model, and the last one alone
    runs = [
        PlantedRun(
            method="mend", settings={"accumulate": on}, benchmarks=(Planted(name="mmlu", kept=kept),), efficacy=keeps(0.9 if on else 0.0)
        )
        for on, kept in planted.items()
    ]
    known = studies()
    found = charts(series_of(read_study([write_run(tmp_path, run) for run in runs], known), known), known)
    (chart,) = [chart for chart in found if chart.question == "artefacts"]
    mean = next(panel for panel in chart.panels if isinstance(panel, Panel) and panel.title.startswith("mean ability"))
    last = {curve.label: curve.points[-1].y for curve in mean.curves}
    assert chart.title == "tiny: mend by accumulate"
    assert last["published code"] == 1
    assert "mend (accumulate=False), which reproduces its fault" in chart.caption
    assert last["True"] < 0.2
    assert {curve.method for curve in mean.curves} == {"mend (accumulate=False)", "mend (accumulate=True)"}  # what filters go by
    assert chart.panels[0].title.startswith("efficacy")


# -- values ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_rome(folders: list[Path]) -> list[ScoreStore]:
    """The two runs of ROME on Llama 2 7B."""
    return [ScoreStore(folder) for folder in folders if folder.name.startswith("llama2-7b-rome")]


def value_of(files: StudyFiles, chart: str, **wanted: str) -> float:
    """Return the only number of a chart's table whose row is this one."""
    (found,) = [float(row["y"]) for row in rows_of(files, chart) if wanted.items() <= row.items()]
    return found


def test_a_cell_of_the_retention_map_is_the_share_of_its_facts_that_pass(files: StudyFiles, of_rome: list[ScoreStore]) -> None:
    passed = [
        sample["outcomes"]["generation"][0]
        for store in of_rome
        for sample in store.samples(10, "edit-quality")
        if sample["metric"] == "efficacy" and 2 <= sample["position"] <= 10
    ]
    assert len(passed) == 18
    assert value_of(files, "retention-llama2-7b", panel="rome, counterfact", curve="edits 2–10", x="10") == pytest.approx(fmean(passed))
    assert not [row for row in rows_of(files, "retention-llama2-7b") if (row["curve"], row["x"]) == ("edits 2–10", "1")]


def test_early_warnings_are_what_the_runs_hold(files: StudyFiles, of_rome: list[ScoreStore]) -> None:
    def warning(panel: str, edits: int) -> float:
        return value_of(files, "monitors-llama2-7b", panel=panel, curve="rome", x=str(edits))

    def choices(benchmark: str) -> list[list[float]]:
        return [[sample["log_probs"].index(-1.0) for sample in store.samples(10, benchmark)] for store in of_rome]

    assert warning("norm of edited weights", 10) == pytest.approx(1.2)  # planted: 1 + edits / 50
    assert warning("canary: perplexity of plain sentences", 10) == pytest.approx(2.0)  # planted: 1 + edits / 10
    assert warning("perplexity passage", 0) == pytest.approx(20)
    assert warning("perplexity passage", 10) == pytest.approx(20 * (1 + 0.5**3))  # planted: by what is kept of mmlu
    broken = [fmean(not sample["generated"] for sample in store.samples(10, "gsm8k")) for store in of_rome]
    assert 0 < fmean(broken) < 1
    assert warning("degenerate texts", 10) == pytest.approx(fmean(broken) / 2)  # beside the answers about facts, of which none is broken
    shares = [max(map(picks.count, picks)) / len(picks) for name in ("mmlu", "truthfulqa") for picks in choices(name)]
    assert warning("commonest choice", 10) == pytest.approx(fmean(shares))


def test_the_table_of_runs_tells_seconds_memory_and_what_was_published(page: str) -> None:
    rows = re.findall(r"<tr data-model=.*?</tr>", section_of(page, "runs"), flags=re.DOTALL)
    cells = [dict(zip(RUN_HEADS, map(words_of, re.findall(r"<t[hd].*?</t[hd]>", row)), strict=False)) for row in rows]
    memit = next(row for row in cells if (row["model"], row["method"], row["seed"]) == ("llama2-7b", "memit", "1"))
    assert {name: memit[name] for name in ("s/edit", "published s/edit", "measuring", "journal", "memory", "norm")} == {
        "s/edit": "1.500",
        "published s/edit": "24.140",  # Table 8 of the paper: 2414 s for 100 edits
        "measuring": "12 s",
        "journal": "1.0 kB",
        "memory": "3.5 GB",
        "norm": "1.200",
    }
    assert {row["published s/edit"] for row in cells if row["method"] == HOSTILE} == {"–"}


# -- drawing ---------------------------------------------------------------------------------------------------------------


def test_a_panel_draws_every_curve_inside_its_axes_and_tells_its_numbers() -> None:
    points = (Point(0, 1.0, 1.0, 1.0), Point(1000, 0.25, 0.1, 3.0))
    panel = Panel(title="t", unit="u", curves=(Curve(label="rome", model="m", method="rome", dataset="d", points=points),))
    drawn = svg([scene(panel)], in_page=True)
    ys = [float(y) for path in re.findall(r'<path d="M([^"hz]*)', drawn) for y in re.findall(r"[\d.]+ ([\d.]+)", path)]
    assert all(0 <= y <= 240 for y in ys)
    assert "0.250 at 1000" in drawn
    assert 'data-method="rome"' in drawn
    assert png([scene(panel)]) == png([scene(panel)])


@given(st.lists(st.floats(-20, 260), min_size=1, max_size=24))
def test_names_of_curves_stand_apart_and_beside_the_axes(wanted: list[float]) -> None:
    heights = drawing._spread(sorted(wanted))
    assert all(drawing.TOP + 3 - 1e-6 <= height <= drawing.BOTTOM + 3 + 1e-6 for height in heights)
    gap = min(drawing.LABEL_GAP, (drawing.BOTTOM - drawing.TOP) / max(1, len(wanted) - 1))
    assert all(after - before >= gap - 1e-6 for before, after in pairwise(heights))


# -- in a browser ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(files: StudyFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as page:
        page.open(files.html.as_uri())
        yield page


SHOWN = "[...document.querySelectorAll('#run-table tbody tr')].filter(row => !row.hidden).length"
CURVES = "[...document.querySelectorAll('figure:not([hidden]) .curve[data-method]:not([hidden])')]"


@needs_browser
def test_it_loads_without_errors_and_asks_for_itself_alone(browser: Page, files: StudyFiles) -> None:
    assert browser.run(SHOWN) == 16
    assert browser.problems == []
    assert set(browser.requests) == {files.html.as_uri()}


@needs_browser
@pytest.mark.parametrize(
    ("name", "value", "left"),
    [("method", "memit", 11), ("model", "llama2-7b-chat", 10), ("dataset", "zsre", 14), ("dataset", "counterfact", 2)],
)
def test_filters_hide_what_is_not_chosen_and_the_button_shows_it_again(browser: Page, name: str, value: str, left: int) -> None:
    kinds = f"[...new Set({CURVES}.map(curve => curve.dataset.{name}))]"
    rows = f"[...new Set([...document.querySelectorAll('tr[data-model]:not([hidden])')].map(row => row.dataset.{name}))]"
    assert value in browser.run(kinds)
    browser.run(f"document.querySelector('input[name={name}][value=\"{value}\"]').click()")
    assert browser.run(SHOWN) == left
    assert value not in browser.run(kinds)
    assert value not in browser.run(rows)  # of runs and of changes
    assert len(browser.run("[...document.querySelectorAll('#run option')].map(option => option.text)")) == left
    assert browser.run("document.getElementById('state').textContent") == f"{left} of 16 runs shown"
    assert f"{name}=" in browser.run("location.search")
    browser.run("document.querySelector('button[type=reset]').click()")
    assert browser.run(f"new Promise(done => setTimeout(() => done({SHOWN}), 50))") == 16
    assert value in browser.run(kinds)


@needs_browser
def test_published_numbers_can_be_hidden(browser: Page) -> None:
    printed = f"{CURVES}.filter(curve => curve.dataset.source === 'published').length"
    ours = f"{CURVES}.filter(curve => curve.dataset.source !== 'published').length"
    before = browser.run(printed), browser.run(ours)
    assert before[0] > 0
    browser.run("document.getElementById('published').click()")
    assert (browser.run(printed), browser.run(ours)) == (0, before[1])
    browser.run("document.getElementById('published').click()")
    assert (browser.run(printed), browser.run(ours)) == before


@needs_browser
def test_a_chosen_seed_shows_its_own_curves_instead_of_all_together(browser: Page) -> None:
    curves = "[...document.querySelectorAll('[aria-labelledby=rq1] figure.quality:not([hidden]) .curve[data-seed]:not([hidden])')]"
    seeds = f"[...new Set({curves}.map(curve => curve.dataset.seed))]"
    assert browser.run(seeds) == ["all"]
    browser.run("document.querySelector('input[name=seed][value=\"1\"]').click()")
    assert browser.run(seeds) == ["0"]
    browser.run("document.querySelector('input[name=seed][value=\"1\"]').click()")


ITEMS = "document.getElementById('item-list')"


def choose_items(browser: Page, benchmark: str) -> None:
    """List a benchmark's items of a run that lost some of all."""
    name = "llama2-7b, memit, counterfact, seed 0, 10 edits"
    run = f"[...document.querySelectorAll('#run option')].find(option => option.text === '{name}').value"
    for element, value in (("run", run), ("which", f"'{benchmark}'")):
        browser.run(f"{{ const e = document.getElementById('{element}'); e.value = {value}; e.dispatchEvent(new Event('change')) }}")


@needs_browser
def test_single_items_show_what_was_written_before_and_after(browser: Page) -> None:
    told = browser.run(f"{ITEMS}.textContent")
    assert "The home of person" in told
    assert "Paris" in told
    choose_items(browser, "gsm8k")
    assert "The home of person" not in browser.run(f"{ITEMS}.textContent")
    assert "The answer is" in browser.run(f"{ITEMS}.textContent")


@needs_browser
def test_single_items_show_the_question_and_the_chosen_answer(browser: Page) -> None:
    choose_items(browser, "mmlu")
    cells = browser.run(f"[...{ITEMS}.querySelector('tbody tr').children].map(cell => cell.innerText)")
    assert re.fullmatch(
        r"Question \d+ of many words about mmlu\?\s+Answer:\s+– town 0\s+– town 1\s+– town 2\s+– town 3\s+mmlu, item \d+", cells[1]
    )
    assert re.fullmatch(r"✓ town \d", cells[3])
    assert re.fullmatch(r"✗ town \d", cells[4])
    assert cells[2] == cells[3].removeprefix("✓ ")


@needs_browser
def test_a_long_question_shows_its_beginning_and_opens(browser: Page) -> None:
    choose_items(browser, "gsm8k")
    question = f"{ITEMS}.querySelector('tbody tr').children[1]"
    closed = browser.run(f"{question}.innerText")
    assert closed.startswith("Question ")
    assert "…" in closed
    assert "about gsm8k?" not in closed
    browser.run(f"{question}.querySelector('summary').focus()")
    browser.key("Enter", 13, "\r")
    assert "of many words about gsm8k?\nAnswer:" in browser.run(f"{question}.innerText")


@needs_browser
def test_the_keyboard_reaches_and_opens_a_filter_and_escape_closes_it(browser: Page) -> None:
    browser.run("document.querySelector('.filter summary').focus()")
    browser.key("Enter", 13, "\r")
    assert browser.run("document.querySelector('.filter').open") is True
    browser.key("Tab", 9)
    browser.key("Tab", 9)
    browser.key("Tab", 9)
    assert browser.run("document.activeElement.name") == "model"
    browser.key("Escape", 27)
    assert browser.run("document.querySelector('.filter').open") is False


@needs_browser
def test_a_column_head_sorts_numbers_as_numbers(browser: Page) -> None:
    browser.run("[...document.querySelectorAll('.sort')].find(b => b.textContent === 'seed').click()")
    assert browser.run("document.querySelector('#run-table tbody tr').children[3].textContent") == "0"
    browser.run("[...document.querySelectorAll('.sort')].find(b => b.textContent === 'seed').click()")
    assert browser.run("document.querySelector('#run-table tbody tr').children[3].textContent") == "1"


@needs_browser
def test_sizes_and_durations_sort_by_what_they_are_and_missing_ones_stay_below(folders: list[Path], tmp_path: Path) -> None:
    sizes = (190_700, 45_700_000, 5)
    for folder, size in zip(folders, sizes, strict=False):
        copied = shutil.copytree(folder, tmp_path / folder.name)
        (copied / "journal" / "segment-000001.journal").write_bytes(b"j" * size)
    seconds = {0: 59.0, 1: 226.0}
    for place, folder in enumerate(sorted((path for path in tmp_path.iterdir()), key=lambda path: path.name)):
        (folder / "timings.jsonl").unlink()
        if place in seconds:
            append_jsonl(folder / "timings.jsonl", [{"ended_by": "end", "seconds": {"measuring mmlu": seconds[place]}}])
    files = write_study(sorted(tmp_path.iterdir()), tmp_path / "out")
    with Page(tmp_path / "profile") as page:
        page.open(files.html.as_uri())
        column = "[...document.querySelectorAll('#run-table tbody tr')].map(row => row.children[{}].textContent)"
        for name, ascending, descending in (
            ("journal", ["5 B", "190.7 kB", "45.7 MB"], ["45.7 MB", "190.7 kB", "5 B"]),
            ("measuring", ["59 s", "3 min 46 s", "–"], ["3 min 46 s", "59 s", "–"]),
        ):
            for wanted, said in ((ascending, "ascending"), (descending, "descending")):
                page.run(f"[...document.querySelectorAll('.sort')].find(b => b.textContent === '{name}').click()")
                assert page.run(column.format(RUN_HEADS.index(name))) == wanted
                assert page.run("[...document.querySelectorAll('[aria-sort]')].map(e => e.tagName + e.getAttribute('aria-sort'))") == [
                    f"TH{said}"
                ]


@needs_browser
@pytest.mark.parametrize(
    ("dark", "paper", "ink"), [(False, "rgb(255, 255, 255)", "rgb(31, 35, 40)"), (True, "rgb(13, 17, 23)", "rgb(230, 237, 243)")]
)
def test_on_a_phone_nothing_is_wider_than_the_screen_by_day_and_by_night(
    files: StudyFiles, tmp_path: Path, dark: bool, paper: str, ink: str
) -> None:
    with Page(tmp_path / "profile", width=390, height=800, dark=dark) as page:
        page.open(files.html.as_uri())
        assert page.run("document.documentElement.scrollWidth") <= 390
        style = "getComputedStyle(document.{}).{}"
        assert page.run(style.format("body", "backgroundColor")) == paper
        assert page.run(style.format("body", "color")) == ink
        title = "querySelector('figure text[font-weight]')"  # figures are drawn in the page's colours
        assert page.run(style.format(title, "fill")) == ink
        assert page.problems == []


def test_item_data_is_json_whatever_the_texts_hold(page: str) -> None:
    data = item_data(page)
    assert any(run["method"] == HOSTILE for run in data["runs"])
    assert all(len(item) == 8 for run in data["runs"] for item in run["items"])


def test_runs_share_the_texts_of_their_questions(page: str) -> None:
    data = item_data(page)
    places = [item[2] for run in data["runs"] for item in run["items"]]
    assert set(places) == set(range(len(data["questions"])))
    assert len(set(data["questions"])) == len(data["questions"]) < len(places)


def test_where_many_long_questions_meet_the_rest_is_cut(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_page, "QUESTION_CHARACTERS", 3000)
    text = write_study(folders[:2], tmp_path).html.read_text()
    data = item_data(text)
    long = [question for question in data["questions"] if "gsm8k" in question or question.endswith("…")]
    assert any(len(question) > study_page.TEXT_CHARACTERS for question in long)
    assert any(len(question) == study_page.TEXT_CHARACTERS and question.endswith("…") for question in long)
    assert sum(map(len, data["questions"])) < 3000 + study_page.TEXT_CHARACTERS * len(data["questions"])
