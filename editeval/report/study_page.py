"""One HTML page over many runs: verdicts, figures, tables, items. Needs nothing but a browser; works from disk, without network.

Figures are drawn here and are whole without the script, which only filters, sorts and looks up single items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from editeval.report.charts import CellMap, Chart, Panel
from editeval.report.drawing import scene
from editeval.report.markup import escaped, scrolling
from editeval.report.published import SOURCE, published_scores, published_seconds
from editeval.report.scene import svg
from editeval.report.series import Change, Series
from editeval.report.study import Run, relative
from editeval.report.verdicts import KEEPS, Outcome, Verdict
from editeval.runner.progress import seconds_text
from editeval.runner.table import MISSING, format_number
from editeval.types import counted

HERE = Path(__file__).parent
ITEM_CHARACTERS = 3_000_000  # of all items on a page; runs share it, so that 200 of them stay below 10 MB
ITEMS_PER_RUN = 60
TEXT_CHARACTERS = 160
SHOWN_CHANGES = 200

RUN_HEADS = (
    *("model", "method", "data set", "seed", "edits", "efficacy", "locality", "ability kept", "n90", "n50", "norm"),
    *("s/edit", "published s/edit", "measuring", "journal", "memory", "page"),
)

QUESTIONS = {
    "rq1": ("RQ1", "How does ability change with the number of edits?"),
    "rq2": ("RQ2", "Do instruction-tuned models lose it differently?"),
    "rq3": ("RQ3", "Does the size of the model matter?"),
    "rq4": ("RQ4", "Which abilities are lost?"),
    "rq5": ("RQ5", "What becomes of safety?"),
}
MORE = {
    "artefacts": ("Settings", "Is it the method, or how a code runs it?"),
    "retention": ("Retention", "Which edits are still there?"),
    "monitors": ("Early warnings", "What shows damage before a benchmark does?"),
}


@dataclass(frozen=True, kw_only=True)
class StudyContent:
    """Everything that a page over many runs shows."""

    title: str
    runs: Sequence[Run]
    series: Sequence[Series]
    verdicts: Sequence[Verdict]
    charts: Sequence[Chart]
    changes: Sequence[Change]
    labels: Mapping[str, str]  # folder of a run -> method with its settings
    datasets: Mapping[str, str]  # folder of a run -> data set with its settings
    folder: Path  # where the page will be: links start here


def study_page(content: StudyContent) -> str:
    """Return the page as one HTML document."""
    sections = [
        ("verdicts", "Verdicts", _verdict_table(content.verdicts)),
        ("runs", "Runs", _run_table(content)),
        *((name, f"{short}: {title}", _question(name, content)) for name, (short, title) in QUESTIONS.items()),
        *((name, f"{short}: {title}", _charts(name, content)) for name, (short, title) in MORE.items()),
        ("changes", "Changes against the unedited model", _changes(content)),
        ("items", "Single items", _items()),
        ("how", "How to read this", _how()),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{escaped(title.split(":")[0])}</a></li>' for name, title, _ in shown)
    parts = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escaped(title)}</h2>\n{body}</section>' for name, title, body in shown
    )
    data = json.dumps(_item_data(content), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template((HERE / "study.html").read_text()).substitute(
        title=escaped(content.title),
        styles=(HERE / "page.css").read_text() + (HERE / "study.css").read_text(),
        counted=_counted(content),
        links=links,
        filters=_filters(content),
        parts=parts,
        data=data,
        script=(HERE / "study.js").read_text(),
    )


def _counted(content: StudyContent) -> str:
    words = []
    for name in ("model", "method", "dataset", "seed"):
        count = len({getattr(run, name) for run in content.runs})
        words.append(f"{count} {'data set' if name == 'dataset' else name}{'' if count == 1 else 's'}")
    return f"{len(content.runs)} run{'' if len(content.runs) == 1 else 's'}: {', '.join(words)}."


# -- filters ---------------------------------------------------------------------------------------------------------------


def _filters(content: StudyContent) -> str:
    names = {
        "model": ("Models", [run.model for run in content.runs]),
        "method": ("Methods", [content.labels[run.folder.as_posix()] for run in content.runs]),
        "dataset": ("Data sets", [content.datasets[run.folder.as_posix()] for run in content.runs]),
        "seed": ("Seeds", [str(run.seed) for run in content.runs]),
    }
    boxes = []
    for name, (title, values) in names.items():
        options = "".join(
            f'<label><input type="checkbox" name="{name}" value="{escaped(value)}" checked> {escaped(value)}</label>'
            for value in sorted(set(values))
        )
        buttons = '<button type="button" class="none">none</button> <button type="button" class="all">all</button>'
        fieldset = f"<fieldset><legend>{title}</legend>{buttons}{options}</fieldset>"
        boxes.append(
            f'<details class="filter" data-name="{name}"><summary>{title} <span class="count"></span></summary>{fieldset}</details>'
        )
    return (
        f'<form id="filters" aria-label="filters">{"".join(boxes)}<button type="reset">Show everything</button>'
        '<label><input type="checkbox" id="published" checked> published numbers</label>'
        '<output id="state" aria-live="polite"></output></form>'
        '<noscript><p class="note">Without scripts everything is shown; filters and single items need them.</p></noscript>'
    )


# -- verdicts, questions ---------------------------------------------------------------------------------------------------


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(QUESTIONS[verdict.question][0])} {escaped(verdict.key)}</th><td>{escaped(verdict.statement)}</td>'
        f"<td>{_badge(verdict.outcome)}</td><td>{escaped(verdict.reason)}</td></tr>"
        for verdict in verdicts
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("", "statement", "verdict", "why"))
    note = f"Statements: the findings of {SOURCE}, made testable. Verdicts are of all runs of this page, whatever is filtered."
    table = f'<table class="text verdicts"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<p class="note">{escaped(note)}</p>{scrolling(table, "verdicts")}'


def _badge(outcome: Outcome) -> str:
    return f'<span class="badge {outcome.value.lower()}">{outcome.value}</span>'


def _question(name: str, content: StudyContent) -> str:
    parts = [_charts(name, content)]
    for verdict in reversed(content.verdicts):
        if verdict.question == name:
            head = f"<strong>{escaped(verdict.key)}</strong> {escaped(verdict.statement)} {_badge(verdict.outcome)}"
            parts.insert(0, f"<p>{head}<br>{escaped(verdict.reason)}</p>")
            if len(verdict.table) > 1:
                parts.append(f"<details><summary>Table of {escaped(verdict.key)}</summary>{_table(verdict.table, verdict.key)}</details>")
    return "".join(parts)


def _charts(name: str, content: StudyContent) -> str:
    parts: list[str] = []
    for chart in content.charts:
        if chart.question == name:
            figures = "".join(_figure(panel) for panel in chart.panels)
            files = ", ".join(f'<a href="figures/{chart.name}.{kind}">{kind.upper()}</a>' for kind in ("png", "svg", "csv"))
            is_open = " open" if not parts else ""
            parts.append(
                f'<details class="chart"{is_open}><summary>{escaped(chart.title)}</summary><div class="figures">{figures}</div>'
                f'<p class="note">{escaped(chart.caption)} Files: {files}.</p></details>'
            )
    return "".join(parts)


def _figure(panel: Panel | CellMap) -> str:
    kind = ' class="quality"' if isinstance(panel, Panel) and panel.quality else ""
    return f"<figure{kind}>{svg([scene(panel)], in_page=True)}</figure>"


# -- runs ------------------------------------------------------------------------------------------------------------------


def _run_table(content: StudyContent) -> str:
    by_run = {run.folder: one for one in content.series for run in one.runs}
    rows = "".join(_run_row(run, by_run.get(run.folder), content) for run in content.runs)
    head = "".join(f'<th scope="col"><button type="button" class="sort">{escaped(name)}</button></th>' for name in RUN_HEADS)
    table = f'<table id="run-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    note = (
        "At the last rung. Ability kept, n90 and n50 (the largest number of edits up to which the lower bound of mean retained ability "
        f"stays above {KEEPS:g} or 0.5) are of all seeds of a series together; ability kept names its number of edits where a seed went "
        "further than the others. A column head sorts."
    )
    return f'{scrolling(table, "runs")}<p class="note">{escaped(note)}</p>{_left_out(content)}'


def _left_out(content: StudyContent) -> str:
    """Return what of the runs counts nowhere, and why; nothing where all counts."""
    notes = [f"{run.folder.name}: {note}" for run in content.runs for note in run.notes]
    notes += [note for one in content.series for note in one.notes]
    lines = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f'<h3 id="left-out">Left out</h3><ul class="left-out">{lines}</ul>' if notes else ""


def _run_row(run: Run, one: Series | None, content: StudyContent) -> str:
    last = run.rungs[-1]
    qualities = [
        run.table.value(last, column) if (column := run.edit_column(metric)) is not None else None for metric in ("efficacy", "locality")
    ]
    common = 0 if one is None else max(one.mean, default=0)  # the last rung at which every run of the series was measured
    kept = None if one is None or not one.mean else one.mean[common].value
    marks = (None, None) if one is None or not one.mean else (one.last_kept(KEEPS), one.last_kept(0.5))
    seconds = [float(edit["seconds"]) for edit in run.edits if edit.get("seconds") is not None]
    norm = next((edit["weight_norm_ratio"] for edit in reversed(run.edits) if edit.get("weight_norm_ratio") is not None), None)
    measuring = sum(value for name, value in run.timings.items() if name.startswith("measuring"))
    page = run.folder / "report" / "report.html"
    link = f'<a href="{escaped(relative(page, content.folder))}">open</a>' if page.exists() else ""
    cells = (
        _number_cell(run.seed, str(run.seed)),
        _number_cell(last, str(last)),
        *(_number_cell(value, format_number(value)) for value in qualities),
        _number_cell(kept, format_number(kept) + (f" at {common}" if 0 < common != last else "")),
        *(_number_cell(mark, "" if mark is None else str(mark)) for mark in marks),
        *(
            _number_cell(value, format_number(value))
            for value in (norm, fmean(seconds) if seconds else None, published_seconds().get((run.model, run.method)))
        ),
        _number_cell(measuring or None, seconds_text(measuring) if measuring else MISSING),
        _number_cell(run.journal_bytes, _bytes(run.journal_bytes)),
        _number_cell(run.peak_memory_bytes, MISSING if run.peak_memory_bytes is None else _bytes(run.peak_memory_bytes)),
    )
    data = _filtered_by(run, content)
    attributes = "".join(f' data-{name}="{escaped(value)}"' for name, value in data.items())
    names = "".join(f"<td>{escaped(data[name])}</td>" for name in ("method", "dataset"))
    return f"<tr{attributes}><th scope=row>{escaped(run.model)}</th>{names}{''.join(cells)}<td>{link}</td></tr>"


def _number_cell(value: float | None, text: str) -> str:
    """Return a cell that is sorted by its number, whatever unit its text has; by nothing where there is none."""
    key = "" if value is None or not math.isfinite(value) else repr(value)
    return f'<td data-sort="{key}">{escaped(text)}</td>'


def _filtered_by(run: Run, content: StudyContent) -> Mapping[str, str]:
    """Return what the filters know a run by: the labels of its series."""
    name = run.folder.as_posix()
    return {"model": run.model, "method": content.labels[name], "dataset": content.datasets[name], "seed": str(run.seed)}


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


# -- changes, items --------------------------------------------------------------------------------------------------------


def _changes(content: StudyContent) -> str:
    found = sorted((change for change in content.changes if change.adjusted < 0.05), key=lambda change: (change.adjusted, change.rung))
    if not content.changes:
        return ""
    rows = "".join(_change_row(change, content) for change in found[:SHOWN_CHANGES])
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("model", "method", "seed", "benchmark", "edits", "change", "p", "p (Holm)"))
    note = (
        f"{len(found)} of {len(content.changes)} paired tests on the same items (McNemar exact; bootstrap for graded scores) differ after "
        f"Holm's adjustment for all of them{f'; the {SHOWN_CHANGES} surest are listed' if len(found) > SHOWN_CHANGES else ''}."
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<p>{escaped(note)}</p><details><summary>List</summary>{scrolling(table, 'changes')}</details>"


def _change_row(change: Change, content: StudyContent) -> str:
    run, data = change.run, _filtered_by(change.run, content)
    attributes = "".join(f' data-{name}="{escaped(value)}"' for name, value in data.items())
    cells = (
        data["method"],
        run.seed,
        change.column.name,
        change.rung,
        f"{change.difference:+.3f}",
        f"{change.p_value:.2g}",
        f"{change.adjusted:.2g}",
    )
    return f'<tr{attributes}><th scope="row">{escaped(run.model)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in cells)}</tr>'


def _items() -> str:
    return (
        '<p><label>Run <select id="run"></select></label> <label>Show <select id="which"></select></label></p>'
        '<div id="item-list" role="region" aria-label="items" aria-live="polite" tabindex="0" class="scroll"></div>'
    )


def _item_data(content: StudyContent) -> Mapping[str, Any]:
    allowance = ITEM_CHARACTERS // max(1, len(content.runs))
    return {"runs": [_items_of(run, _filtered_by(run, content), allowance) for run in content.runs]}


def _items_of(run: Run, filtered_by: Mapping[str, str], allowance: int) -> Mapping[str, Any]:
    """Return the items of a run that fit: lost ones first, and of each benchmark about as many."""
    by_benchmark: dict[str, list[Any]] = {}
    for item in sorted(
        run.changed, key=lambda item: (not (item.passed_before and not item.passed_after), item.passed_before == item.passed_after)
    ):
        by_benchmark.setdefault(item.benchmark, []).append(item)
    each = max(1, ITEMS_PER_RUN // max(1, len(by_benchmark)))
    rows: list[list[Any]] = []
    used = 0
    for benchmark, items in by_benchmark.items():
        for item in items[:each]:
            texts = [text[:TEXT_CHARACTERS] for text in (item.name, item.expected, item.before, item.after)]
            used += sum(map(len, texts)) + 40
            if used > allowance:
                break
            rows.append([benchmark, *texts, int(item.passed_before), int(item.passed_after)])
    whose = ", ".join(filtered_by[name] for name in ("model", "method", "dataset"))
    return {"name": f"{whose}, seed {run.seed}, {counted(run.rungs[-1], 'edit')}", **filtered_by, "items": rows}


# -- words -----------------------------------------------------------------------------------------------------------------


def _how() -> str:
    doubts = sum(bool(row.doubt) for row in published_scores())
    lines = (
        "Ability kept is (score − chance) / (unedited score − chance) on the same items. Intervals are Fieller's, at 95%, over items "
        "and, with several seeds, over orders of edits (Satterthwaite's degrees of freedom). One seed says nothing of other orders.",
        "Filters hide; they never change a statistic: means over benchmarks, verdicts and tests are of all seeds.",
        "Means over benchmarks count those on which the unedited model is above chance, all scored in the same way.",
        "A series confirms that a method preserves ability only if its edits are there: efficacy over all edits so far, "
        "its lower bound at least 0.1 above the unedited model's.",
        f"Published curves are from {SOURCE} ({len(published_scores())} numbers in editeval/report/published, {doubts} with a doubt). "
        "They are drawn where model, method, benchmark and way of scoring are the same, and enter no statistic.",
    )
    return f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>"


def _table(rows: Sequence[Sequence[str]], label: str) -> str:
    heads = "".join(f'<th scope="col">{escaped(head)}</th>' for head in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])}</tr>' for row in rows[1:]
    )
    return scrolling(f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>", f"table of {label}")
