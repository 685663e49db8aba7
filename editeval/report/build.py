"""Write a run's report: `report/` in its folder with the page, the picture and the table, and by command every figure as a file.

python -m editeval report runs/<run>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from editeval.files import write_atomic
from editeval.interfaces import Callback, RunState
from editeval.report.answers import answers
from editeval.report.charts import name_of
from editeval.report.figures import curves_figure, png, retention_figure, svg
from editeval.report.page import PageContent, page
from editeval.report.panels import overview, panels
from editeval.report.study import standing_digests
from editeval.report.table import matrix_csv, table_csv, table_markdown
from editeval.runner.results import ScoreStore
from editeval.runner.retention import retention
from editeval.runner.run_files import read_edits, read_manifest, read_timings
from editeval.runner.table import headline, score_table
from editeval.types import EditevalError, Score

MATRICES = (("efficacy", "generation"), ("locality", "generation"))
SHOWN_ANSWERS = 20


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where the parts of a report are."""

    png: Path
    html: Path
    csv: Path
    markdown: Path
    figures: Path | None = None  # a folder: every figure of the page as PNG, SVG and CSV


@dataclass(kw_only=True)
class WriteReport(Callback):
    """Writes the report when every rung is measured, and says where it is."""

    console: Console | None = None

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Write it."""
        files = write_report(state.run_dir, scores, read_manifest(state.run_dir))
        (self.console or Console()).print(f"report in {files.html}\npicture in {files.png}", markup=False, highlight=False, soft_wrap=True)


def run_report(run_dir: Path | str, *, to: Path | None = None) -> ReportFiles:
    """Write the report of a run from what is on disk alone, with every figure of its page as PNG, SVG and CSV.

    Raises:
        EditevalError: the folder is no run's, or nothing was measured in it yet.
    """
    manifest = read_manifest(run_dir)
    store = ScoreStore(run_dir)
    scores = store.scores(standing_digests(store, manifest, read_edits(run_dir)))
    files, content = _write(run_dir, scores, manifest, to=to)
    folder = files.html.parent / "figures"
    for panel in panels(content.table):
        _write_figure(folder / name_of(panel.title, panel.unit), curves_figure([panel]), table_csv(panel.table))
    for matrix in content.matrices:
        _write_figure(folder / name_of("retention", matrix.metric, matrix.protocol), retention_figure(matrix), matrix_csv(matrix))
    return replace(files, figures=folder)


def write_report(run_dir: Path | str, scores: Sequence[Score], manifest: Mapping[str, Any], *, to: Path | None = None) -> ReportFiles:
    """Write page, picture and table of these scores into `to` (the run's `report/`); samples, edits and timings are read from the run.

    Raises:
        EditevalError: there are no scores.
    """
    return _write(run_dir, scores, manifest, to=to)[0]


def _write(
    run_dir: Path | str, scores: Sequence[Score], manifest: Mapping[str, Any], *, to: Path | None
) -> tuple[ReportFiles, PageContent]:
    if not scores:
        raise EditevalError(
            f"nothing is measured in {run_dir} yet, so there is nothing to report; run the same command again to continue it"
        )
    folder = Path(run_dir) / "report" if to is None else to
    files = ReportFiles(png=folder / "curves.png", html=folder / "report.html", csv=folder / "table.csv", markdown=folder / "table.md")
    whole = score_table(scores)
    shown = headline(whole)
    samples = _samples(ScoreStore(run_dir), scores)
    matrices = [retention(samples, metric=metric, protocol=protocol) for metric, protocol in MATRICES]
    content = PageContent(
        title=_title(manifest, run_dir),
        table=shown,
        manifest=manifest,
        edits=[edit for edit in read_edits(run_dir) if edit["num_edits"] <= shown.rungs[-1]],
        timings=read_timings(run_dir),
        matrices=[matrix for matrix in matrices if matrix is not None],
        answers=answers(samples, metric="efficacy", limit=SHOWN_ANSWERS),
    )
    write_atomic(files.csv, table_csv(whole))
    write_atomic(files.markdown, table_markdown(shown))
    write_atomic(files.png, png(curves_figure(overview(panels(shown)), title=content.title)))
    write_atomic(files.html, page(content))
    return files, content


def _write_figure(path: Path, figure: Figure, numbers: str) -> None:
    """Write one figure as PNG and SVG, and its numbers as CSV, beside one another."""
    write_atomic(path.with_name(f"{path.name}.csv"), numbers)
    write_atomic(path.with_name(f"{path.name}.svg"), svg(figure, salt=path.name))
    write_atomic(path.with_name(f"{path.name}.png"), png(figure))


def _samples(store: ScoreStore, scores: Sequence[Score]) -> dict[int, tuple[Mapping[str, Any], ...]]:
    """Return by rung the samples that name the position of a fact."""
    cells = dict.fromkeys((score.num_edits, score.benchmark, score.benchmark_key) for score in scores)
    found: dict[int, tuple[Mapping[str, Any], ...]] = {}
    for num_edits, benchmark, key in cells:
        records = tuple(record for record in store.samples(num_edits, benchmark, key) if "position" in record)
        if records and num_edits not in found:  # a second setting of the same benchmark would double every fact
            found[num_edits] = records
    return found


def _title(manifest: Mapping[str, Any], run_dir: Path | str) -> str:
    config = manifest.get("config", {})
    names = [
        str(config[group]["name"])
        for group in ("model", "method", "dataset")
        if isinstance(config.get(group), Mapping) and "name" in config[group]
    ]
    return " · ".join(names) if names else Path(run_dir).name
