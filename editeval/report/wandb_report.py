"""The same story as a report on Weights & Biases, over the runs that were logged there.

python -m editeval report runs/ --wandb ENTITY/PROJECT

The report is built from what is on disk (questions, verdicts, which columns there are); its plots are W&B's own, over the
project's runs. Its specification is always written as JSON; it is saved on the server only where an account is configured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editeval.files import write_atomic
from editeval.report.series import Series
from editeval.report.study_page import QUESTIONS
from editeval.report.table import markdown_row
from editeval.report.verdicts import Verdict
from editeval.runner.wandb_mirror import has_wandb_account
from editeval.types import ConfigError, EditevalError

SPEC_FILE = "wandb-report.json"
QUALITY = ("efficacy", "locality")


def write_wandb_report(target: str, series: Sequence[Series], verdicts: Sequence[Verdict], to: Path, *, title: str) -> str:
    """Write the specification into a folder, save the report where an account is configured, and return its address or the file's.

    Raises:
        ConfigError: the target is not ENTITY/PROJECT.
        EditevalError: the server refused the report; the specification is on disk.
    """
    entity, slash, project = target.partition("/")
    if not (slash and entity and project) or "/" in project:
        raise ConfigError(f"--wandb {target!r} is not ENTITY/PROJECT, such as --wandb my-team/editing")
    report = _report(entity, project, series, verdicts, title=title)
    path = to / SPEC_FILE
    write_atomic(path, report._to_model().model_dump_json(indent=1, by_alias=True, exclude_none=True))
    if os.environ.get("WANDB_MODE", "online") != "online" or not has_wandb_account():
        return str(path)
    try:
        report.save()
    except Exception as error:
        raise EditevalError(f"W&B did not take the report ({error}); its specification is in {path}") from error
    return str(report.url)


def _report(entity: str, project: str, series: Sequence[Series], verdicts: Sequence[Verdict], *, title: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    # A set of runs that names no project is the report's own project's, and can be written without an account.
    def grid(names: Sequence[str], metrics: Sequence[str]) -> Any:
        panels = [wr.LinePlot(title=name, x="num_edits", y=[metric], log_x=True) for name, metric in zip(names, metrics, strict=True)]
        return wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=panels)

    quality = list(dict.fromkeys(column.name for one in series for metric in QUALITY if (column := one.runs[0].edit_column(metric))))
    ability = list(dict.fromkeys(column.name for one in series for column in one.ability))
    safety = list(dict.fromkeys(column.name for one in series for column in one.safety))
    monitors = list(dict.fromkeys(c.name for one in series for c in one.runs[0].table.columns if c.metric == "perplexity"))
    blocks: list[Any] = [wr.TableOfContents()]
    for name, (short, question) in QUESTIONS.items():
        blocks.append(wr.H1(f"{short}: {question}"))
        blocks += [wr.MarkdownBlock(_markdown(verdict)) for verdict in verdicts if verdict.question == name]
        metrics = [*quality, *(safety if name == "rq5" else ability)]
        blocks.append(grid(metrics, metrics))
    if monitors:
        blocks += [wr.H1("Early warnings"), grid(monitors, monitors)]
    return wr.Report(entity=entity, project=project, title=title, description="Written by editeval from the runs on disk.", blocks=blocks)


def _markdown(verdict: Verdict) -> str:
    lines = [f"**{verdict.key}** {verdict.statement} **{verdict.outcome}**", "", verdict.reason]
    if len(verdict.table) > 1:
        head, *rows = verdict.table
        lines += ["", markdown_row(head), markdown_row(["---"] * len(head)), *(markdown_row(row) for row in rows)]
    return "\n".join(lines)
