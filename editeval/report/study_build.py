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
from editeval.report.findings import findings
from editeval.report.scene import png, svg
from editeval.report.series import changes, series_of
from editeval.report.study import STUDIES_FILE, read_study, studies
from editeval.report.study_charts import charts
from editeval.report.study_page import study_page
from editeval.report.study_tables import StudyContent
from editeval.report.verdicts import Verdict
from editeval.report.wandb_report import project_of, write_wandb_report

FIGURE_COLUMNS = 4
TITLE = "Editing: what is gained, what is lost"


@dataclass(frozen=True, kw_only=True)
class StudyFiles:
    """Where the parts of a report over many runs are, and what it says."""

    html: Path
    figures: Path
    wandb: str | None  # the address of the W&B report, or the file of its specification
    verdicts: tuple[Verdict, ...]


def write_study(folders: Sequence[Path], to: Path, *, names: Path = STUDIES_FILE, wandb: str | None = None) -> StudyFiles:
    """Write `report.html` and `figures/` into a folder, from what is on disk alone; for `wandb`, ENTITY/PROJECT, a W&B report too.

    Raises:
        ConfigError: `wandb` is not ENTITY/PROJECT.
        EditevalError: nothing is measured in any of the runs.
    """
    project = None if wandb is None else project_of(wandb)  # before anything is written
    known = studies(names)
    runs = read_study(folders, known)
    series = series_of(runs, known)
    drawn, verdicts = charts(series, known), findings(series, known)
    content = StudyContent(
        title=TITLE,
        runs=runs,
        series=series,
        verdicts=verdicts,
        charts=drawn,
        changes=changes(series),
        folder=to,
    )
    for chart in drawn:
        _write_figure(chart, to / "figures")
    write_atomic(to / "report.html", study_page(content))
    address = None if project is None else write_wandb_report(project, content, to)
    return StudyFiles(html=to / "report.html", figures=to / "figures", wandb=address, verdicts=verdicts)


def _write_figure(chart: Chart, folder: Path) -> None:
    scenes = [scene(without_seeds(panel)) for panel in chart.panels]
    write_atomic(folder / f"{chart.name}.csv", chart_csv(chart))
    write_atomic(folder / f"{chart.name}.svg", svg(scenes, columns=FIGURE_COLUMNS, title=chart.title))
    write_atomic(folder / f"{chart.name}.png", png(scenes, columns=FIGURE_COLUMNS, title=chart.title))
