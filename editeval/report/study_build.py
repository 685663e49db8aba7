"""Write the report of many runs: one page, and every figure as PNG, SVG and CSV.

python -m editeval report runs/ --to report/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from editeval.files import write_atomic
from editeval.report.charts import Chart, chart_csv, without_seeds
from editeval.report.drawing import scene
from editeval.report.findings import Verdict, findings
from editeval.report.scene import png, svg
from editeval.report.series import changes, method_labels, series_of
from editeval.report.study import STUDIES_FILE, read_study, studies
from editeval.report.study_charts import charts
from editeval.report.study_page import StudyContent, study_page

FIGURE_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class StudyFiles:
    """Where the parts of a report over many runs are, and what it says."""

    html: Path
    figures: Path
    verdicts: tuple[Verdict, ...]


def write_study(
    folders: Sequence[Path], to: Path, *, names: Path = STUDIES_FILE, title: str = "Editing: what is gained, what is lost"
) -> StudyFiles:
    """Write `report.html` and `figures/` into a folder, from what is on disk alone.

    Raises:
        EditevalError: nothing is measured in any of the runs.
    """
    known = studies(names)
    runs = read_study(folders, known)
    series = series_of(runs, known)
    drawn = charts(series, known)
    verdicts = findings(series, known)
    content = StudyContent(
        title=title,
        runs=runs,
        series=series,
        verdicts=verdicts,
        charts=drawn,
        changes=changes(series),
        labels=method_labels(runs),
        folder=to,
    )
    for chart in drawn:
        _write_figure(chart, to / "figures")
    write_atomic(to / "report.html", study_page(content))
    return StudyFiles(html=to / "report.html", figures=to / "figures", verdicts=verdicts)


def _write_figure(chart: Chart, folder: Path) -> None:
    scenes = [scene(without_seeds(panel)) for panel in chart.panels]
    write_atomic(folder / f"{chart.name}.csv", chart_csv(chart))
    write_atomic(folder / f"{chart.name}.svg", svg(scenes, columns=FIGURE_COLUMNS, title=chart.title))
    write_atomic(folder / f"{chart.name}.png", png(scenes, columns=FIGURE_COLUMNS, title=chart.title))
