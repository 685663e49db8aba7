"""The same story as a report on Weights & Biases, over the runs that were logged there.

python -m editeval report runs/ --wandb ENTITY/PROJECT

Its sections are those of the page (`study_tables.SECTIONS`). What W&B logs is shown by W&B's own panels, over the project's runs; what
it does not log is a table of the numbers on disk, or said to be missing. The specification is always written as JSON; the report is saved
on the server only where an account is configured. Built again into the same folder, it takes the place of the one before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from editeval.files import write_atomic
from editeval.report.charts import AXES, CellMap, Chart, Panel
from editeval.report.drawing import size_text
from editeval.report.study import Run, about_edits
from editeval.report.study_tables import (
    CHANGE_HEADS,
    QUESTIONS,
    RUN_HEADS,
    SECTIONS,
    StudyContent,
    change_note,
    change_row,
    counted_runs,
    how_to_read,
    left_out,
    names_of_run,
    run_note,
    run_numbers,
    sure_changes,
    verdict_note,
)
from editeval.report.table import markdown_row
from editeval.report.verdicts import Verdict
from editeval.runner.mirrored import SIGNS
from editeval.runner.results import ScoreStore
from editeval.runner.table import MISSING, Column, format_number
from editeval.runner.wandb_mirror import has_wandb_account
from editeval.types import ConfigError, EditevalError

SPEC_FILE = "wandb-report.json"
QUALITY = ("efficacy", "locality")
WARNINGS = ("perplexity", "bits_per_token", "degenerate_rate", "unended_rate", "top_answer_share")
SHOWN_CHANGES = 50
FROM_DISK = ("norm of edited weights", "degenerate texts", "commonest choice")  # panels of early warnings that W&B has not
TABLE_POINTS = 12  # columns of a table of a curve


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Panels of W&B: logged numbers over the number of edits, logged tables, and the settings in which its runs differ."""

    curves: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    settings: bool = False


Part = str | Grid  # Markdown, or panels


class Project(NamedTuple):
    """Where on W&B a report is."""

    entity: str
    name: str


def project_of(target: str) -> Project:
    """Return the project that ENTITY/PROJECT names.

    Raises:
        ConfigError: it is not of that form.
    """
    entity, slash, name = target.partition("/")
    if not (slash and entity and name) or "/" in name:
        raise ConfigError(f"--wandb {target!r} is not ENTITY/PROJECT, such as --wandb my-team/editing")
    return Project(entity, name)


def write_wandb_report(project: Project, content: StudyContent, to: Path) -> str:
    """Write the specification into a folder, save the report where an account is configured, and return its address or the file's.

    Raises:
        EditevalError: the server refused the report; the specification is on disk.
    """
    report = _report(project, content)
    path = to / SPEC_FILE
    report.id = _saved_id(path, project)
    _write_specification(report, path)
    if os.environ.get("WANDB_MODE", "online") != "online" or not has_wandb_account():
        return str(path)
    try:
        report.save()
    except Exception as error:
        raise EditevalError(
            f"W&B did not take the report ({error}); its specification is in {path}. Where the report was deleted on W&B, remove that file"
        ) from error
    _write_specification(report, path)  # with the id that the server gave it
    return str(report.url)


def _saved_id(path: Path, project: Project) -> str:
    """Return the id of the report that was built into this folder for this project before; empty where none was saved."""
    written = json.loads(path.read_text()) if path.is_file() else {}
    before = written.get("project") == {"entityName": project.entity, "name": project.name}
    return str(written.get("id", "")) if before else ""


def _write_specification(report: Any, path: Path) -> None:
    write_atomic(path, report._to_model().model_dump_json(indent=1, by_alias=True, exclude_none=True))


def _report(project: Project, content: StudyContent) -> Any:
    import wandb_workspaces.reports.v2 as wr

    def block(part: Part) -> Any:
        if isinstance(part, str):
            return wr.MarkdownBlock(part)
        panels = [wr.LinePlot(title=name, x="num_edits", y=[name], log_x=True) for name in part.curves]
        panels += [wr.WeavePanelSummaryTable(table_name=name) for name in part.tables]
        panels += [wr.RunComparer(diff_only=True)] if part.settings else []
        # A set of runs that names no project is the report's own project's, and can be written without an account.
        return wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=panels)

    blocks: list[Any] = [wr.TableOfContents()]
    for name, title in SECTIONS.items():
        blocks += [wr.H1(title), *map(block, _section(name, content))]
    about = "Written by editeval from the runs on disk."
    return wr.Report(entity=project.entity, project=project.name, title=content.title, description=about, blocks=blocks)


def _section(name: str, content: StudyContent) -> Iterator[Part]:
    if name in QUESTIONS:
        return _question(name, content)
    makers: Mapping[str, Callable[[StudyContent], Iterator[Part]]] = {
        "verdicts": _verdicts,
        "runs": _runs,
        "artefacts": _artefacts,
        "retention": _retention,
        "monitors": _monitors,
        "changes": _changes,
        "items": _items,
        "how": _how,
    }
    return makers[name](content)


# -- sections --------------------------------------------------------------------------------------------------------------


def _verdicts(content: StudyContent) -> Iterator[Part]:
    rows = [(f"{QUESTIONS[one.question][0]} {one.key}", one.statement, one.outcome, one.reason) for one in content.verdicts]
    yield f"{verdict_note()}\n\n{_table((('', 'statement', 'verdict', 'why'), *rows))}"


def _runs(content: StudyContent) -> Iterator[Part]:
    names = {run.folder: names_of_run(run, content) for run in content.runs}
    rows = [
        (*(names[run.folder][name] for name in ("model", "method", "dataset")), *(number.text for number in run_numbers(run, content)))
        for run in content.runs
    ]
    yield f"{counted_runs(content)} {run_note()}\n\n{_table((RUN_HEADS, *rows))}"
    notes = left_out(content)
    if notes:
        yield "**Left out**\n\n" + "\n".join(f"- {_line(note)}" for note in notes)
    yield "W&B logs the seconds of every edit; memory, bytes and the time of measuring are in the table alone."
    yield Grid(curves=(*_quality(content), *(("edit/seconds",) if any(_logged_edits(content)) else ())), settings=True)


def _question(name: str, content: StudyContent) -> Iterator[Part]:
    yield from (_verdict(verdict) for verdict in content.verdicts if verdict.question == name)
    found = _charts(name, content)
    if name == "rq3" and found:
        yield "W&B logs the name of a model, not its size: its curves are over the number of edits. Over the size, from disk:"
    elif found:
        yield "W&B logs plain scores, one curve a run. What is of several benchmarks or seeds together, from disk:"
    for chart in found:
        whole = name in ("rq3", "rq4")  # no panel of theirs shows plain scores
        yield _chart(chart, [panel for panel in chart.panels if whole or panel.title.startswith("mean ability")])
    measured = _measured(content, safety=name == "rq5")
    if not measured:
        yield f"W&B holds no measure of {'safety' if name == 'rq5' else 'ability'} of these runs."
    yield Grid(curves=(*_quality(content), *measured))


def _artefacts(content: StudyContent) -> Iterator[Part]:
    found = _charts("artefacts", content)
    if not found:
        yield "No method was run with several settings, PMET not beside MEMIT, and no benchmark in several forms."
        return
    yield "W&B shows in which settings its runs differ, and one curve a run. Side by side, from disk:"
    yield from (_chart(chart, chart.panels) for chart in found)
    yield Grid(curves=(*_quality(content), *_measured(content, safety=False)), settings=True)


def _retention(content: StudyContent) -> Iterator[Part]:
    tables = [
        f"{benchmark}/retention/{name}"
        for run in content.runs
        for benchmark in sorted(about_edits(run.table.columns))
        for name in _logged(run).get("retention") or ()
    ]
    if tables:
        yield Grid(tables=tuple(dict.fromkeys(tables)))
    else:
        yield "W&B holds no retention matrix of these runs: none was launched with `logger.wandb.retention`. From disk:"
    yield from (_chart(chart, chart.panels) for chart in _charts("retention", content))


def _monitors(content: StudyContent) -> Iterator[Part]:
    warnings = _columns((run, column) for run in content.runs for column in run.table.columns if column.metric in WARNINGS)
    diagnostics = dict.fromkeys(f"edit/{name}" for edit in _logged_edits(content) for name in edit.get("diagnostics", {}))
    signs = [f"edit/{name}" for name in SIGNS if any(name in edit for edit in _logged_edits(content))]
    yield Grid(curves=(*_quality(content)[:1], *warnings, *signs, *diagnostics))
    yield "W&B logs degenerate output only where a benchmark measures it. From disk, with the norms that earlier versions did not log:"
    for chart in _charts("monitors", content):
        yield _chart(chart, [panel for panel in chart.panels if panel.title in FROM_DISK])


def _changes(content: StudyContent) -> Iterator[Part]:
    if not content.changes:
        yield "Nothing was tested: there are no items of the unedited model and of an edited one."
        return
    rows = [change_row(change, content) for change in sure_changes(content)[:SHOWN_CHANGES]]
    yield f"W&B logs no tests. Of the items on disk, {change_note(content, shown=SHOWN_CHANGES)}"
    if rows:
        yield _table((CHANGE_HEADS, *rows))


def _items(content: StudyContent) -> Iterator[Part]:
    tables: dict[str, None] = {}
    for run in content.runs:
        if _logged(run).get("sample_rows"):
            store = ScoreStore(run.folder)
            names = dict.fromkeys(column.benchmark for column in run.table.columns if f"{column.benchmark}/samples" not in tables)
            tables |= {f"{name}/samples": None for name in names if store.samples(run.rungs[-1], name)}
    if tables:
        yield Grid(tables=tuple(tables))
    else:
        yield "W&B holds no items of these runs: none was launched with `logger.wandb.sample_rows`. The page has them."


def _how(_: StudyContent) -> Iterator[Part]:
    yield "\n".join(f"- {line}" for line in how_to_read())


# -- what W&B holds --------------------------------------------------------------------------------------------------------


def _logged(run: Run) -> Mapping[str, Any]:
    """Return what a run told W&B to log beside numbers; a run that had no such logger and is sent later logs numbers alone."""
    return (run.config.get("logger") or {}).get("wandb") or {}


def _columns(found: Iterable[tuple[Run, Column]]) -> tuple[str, ...]:
    """Return the names under which columns are logged, each once."""
    return tuple(dict.fromkeys(run.table.any_score(column).name for run, column in found))


def _quality(content: StudyContent) -> tuple[str, ...]:
    return _columns((run, column) for metric in QUALITY for run in content.runs if (column := run.edit_column(metric)) is not None)


def _measured(content: StudyContent, *, safety: bool) -> tuple[str, ...]:
    return _columns((one.runs[0], column) for one in content.series for column in (one.safety if safety else one.ability))


def _logged_edits(content: StudyContent) -> Iterator[Mapping[str, Any]]:
    return (edit for run in content.runs if _logged(run).get("log_edits", True) for edit in run.edits)


# -- Markdown --------------------------------------------------------------------------------------------------------------


def _charts(question: str, content: StudyContent) -> list[Chart]:
    return [chart for chart in content.charts if chart.question == question]


def _verdict(verdict: Verdict) -> str:
    told = f"**{verdict.key}** {verdict.statement} **{verdict.outcome}**\n\n{verdict.reason}"
    return f"{told}\n\n{_table(verdict.table)}" if len(verdict.table) > 1 else told


def _chart(chart: Chart, panels: Sequence[Panel | CellMap]) -> str:
    """Return panels of a chart as tables."""
    parts = [f"**{_line(chart.title)}**"]
    for panel in panels:
        unit = "" if isinstance(panel, CellMap) else f" ({panel.unit}), by {AXES[panel.axis]}"
        parts.append(f"{_line(panel.title)}{unit}\n\n{_table(_map_rows(panel) if isinstance(panel, CellMap) else _panel_rows(panel))}")
    return "\n\n".join(parts)


def _map_rows(cells: CellMap) -> list[Sequence[str]]:
    rows = [(row, *map(format_number, values)) for row, values in zip(cells.rows, cells.values, strict=True)]
    return [("", *(f"after {column}" for column in cells.columns)), *rows]


def _panel_rows(panel: Panel) -> list[Sequence[str]]:
    """Return a row a curve of all seeds, with the numbers of at most `TABLE_POINTS` places."""
    curves = [curve for curve in panel.curves if curve.seed is None and not curve.published]
    xs = sorted({point.x for curve in curves for point in curve.points})
    places = sorted({*xs[:: -(-len(xs) // TABLE_POINTS)], xs[-1]}) if xs else []
    models, datasets = ({getattr(curve, name) for curve in curves} for name in ("model", "dataset"))
    rows = []
    for curve in curves:
        names = (curve.label, curve.model if len(models) > 1 else "", curve.dataset if len(datasets) > 1 else "")
        told = {point.x: point.told() for point in curve.points}
        rows.append((", ".join(filter(None, names)), *(told.get(x, MISSING) for x in places)))
    return [("", *(size_text(x) if panel.axis == "size" else f"{x:g}" for x in places)), *rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join([markdown_row(head), markdown_row(["---"] * len(head)), *(markdown_row([*map(_line, row)]) for row in body)])


def _line(text: str) -> str:
    """Return a text on one line, as a cell or an entry of a list must be."""
    return " ".join(text.split())
