"""One HTML page over many runs: verdicts, figures, tables, items. Needs nothing but a browser; works from disk, without network.

Figures are drawn here and are whole without the script, which only filters, sorts and looks up single items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from editeval.report.charts import CellMap, Panel
from editeval.report.drawing import scene
from editeval.report.markup import escaped, scrolling
from editeval.report.scene import svg
from editeval.report.series import Change
from editeval.report.study import Run, relative
from editeval.report.study_tables import (
    CHANGE_HEADS,
    MORE,
    QUESTIONS,
    RUN_HEADS,
    SECTIONS,
    Number,
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
from editeval.report.verdicts import Outcome, Verdict
from editeval.types import counted

HERE = Path(__file__).parent
ITEM_CHARACTERS = 3_000_000  # of all items on a page; runs share it, so that 200 of them stay below 10 MB
ITEMS_PER_RUN = 60
TEXT_CHARACTERS = 160  # that every text of an item may have
QUESTION_CHARACTERS = 1_500_000  # of all questions on a page; beyond it they are cut
WHOLE_CHARACTERS = 4000  # a longer text is a document, which nobody reads in a table
SHOWN_CHANGES = 200


def study_page(content: StudyContent) -> str:
    """Return the page as one HTML document."""
    bodies = {
        "verdicts": _verdict_table(content.verdicts),
        "runs": _run_table(content),
        **{name: _question(name, content) for name in QUESTIONS},
        **{name: _charts(name, content) for name in MORE},
        "changes": _changes(content),
        "items": _items(),
        "how": f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in how_to_read())}</ul>",
    }
    shown = [(name, title, bodies[name]) for name, title in SECTIONS.items() if bodies[name]]
    links = "".join(f'<li><a href="#{name}">{escaped(title.split(":")[0])}</a></li>' for name, title, _ in shown)
    parts = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escaped(title)}</h2>\n{body}</section>' for name, title, body in shown
    )
    data = json.dumps(_item_data(content), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template((HERE / "study.html").read_text()).substitute(
        title=escaped(content.title),
        styles=(HERE / "page.css").read_text() + (HERE / "study.css").read_text(),
        counted=counted_runs(content),
        links=links,
        filters=_filters(content),
        parts=parts,
        data=data,
        script=(HERE / "study.js").read_text(),
    )


# -- filters ---------------------------------------------------------------------------------------------------------------


def _filters(content: StudyContent) -> str:
    titles = {"model": "Models", "method": "Methods", "dataset": "Data sets", "seed": "Seeds"}
    known = [names_of_run(run, content) for run in content.runs]
    boxes = []
    for name, title in titles.items():
        options = "".join(
            f'<label><input type="checkbox" name="{name}" value="{escaped(value)}" checked> {escaped(value)}</label>'
            for value in sorted({names[name] for names in known})
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
    table = f'<table class="text verdicts"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<p class="note">{escaped(verdict_note())}</p>{scrolling(table, "verdicts")}'


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
    rows = "".join(_run_row(run, content) for run in content.runs)
    head = "".join(f'<th scope="col"><button type="button" class="sort">{escaped(name)}</button></th>' for name in (*RUN_HEADS, "page"))
    table = f'<table id="run-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    lines = "".join(f"<li>{escaped(note)}</li>" for note in left_out(content))
    without = f'<h3 id="left-out">Left out</h3><ul class="left-out">{lines}</ul>' if lines else ""
    return f'{scrolling(table, "runs")}<p class="note">{escaped(run_note())} A column head sorts.</p>{without}'


def _run_row(run: Run, content: StudyContent) -> str:
    page = run.folder / "report" / "report.html"
    link = f'<a href="{escaped(relative(page, content.folder))}">open</a>' if page.exists() else ""
    names = names_of_run(run, content)
    told = "".join(f"<td>{escaped(names[name])}</td>" for name in ("method", "dataset"))
    numbers = "".join(_number_cell(number) for number in run_numbers(run, content))
    return f"<tr{_filtered_by(names)}><th scope=row>{escaped(run.model)}</th>{told}{numbers}<td>{link}</td></tr>"


def _number_cell(number: Number) -> str:
    key = "" if number.value is None or not math.isfinite(number.value) else repr(number.value)
    return f'<td data-sort="{key}">{escaped(number.text)}</td>'


def _filtered_by(names: Mapping[str, str]) -> str:
    """Return the attributes that the filters know a row by."""
    return "".join(f' data-{name}="{escaped(value)}"' for name, value in names.items())


# -- changes, items --------------------------------------------------------------------------------------------------------


def _changes(content: StudyContent) -> str:
    if not content.changes:
        return ""
    rows = "".join(_change_row(change, content) for change in sure_changes(content)[:SHOWN_CHANGES])
    heads = "".join(f'<th scope="col">{head}</th>' for head in CHANGE_HEADS)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    note = escaped(change_note(content, shown=SHOWN_CHANGES))
    return f"<p>{note}</p><details><summary>List</summary>{scrolling(table, 'changes')}</details>"


def _change_row(change: Change, content: StudyContent) -> str:
    model, *cells = change_row(change, content)
    told = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
    return f'<tr{_filtered_by(names_of_run(change.run, content))}><th scope="row">{escaped(model)}</th>{told}</tr>'


def _items() -> str:
    return (
        '<p><label>Run <select id="run"></select></label> <label>Show <select id="which"></select></label></p>'
        '<div id="item-list" role="region" aria-label="items" aria-live="polite" tabindex="0" class="scroll"></div>'
    )


def _item_data(content: StudyContent) -> Mapping[str, Any]:
    allowance = ITEM_CHARACTERS // max(1, len(content.runs))
    questions = _Questions()
    runs = [_items_of(run, names_of_run(run, content), allowance, questions) for run in content.runs]
    return {"runs": runs, "questions": list(questions.places)}


@dataclass(kw_only=True)
class _Questions:
    """The texts of questions in the order of their places: runs that were asked the same share them."""

    places: dict[str, int] = field(default_factory=dict)
    characters: int = 0

    def place_of(self, question: str) -> int:
        """Return the place of a question; whole while there is room, which adds it."""
        text = _cut(question, WHOLE_CHARACTERS if self.characters < QUESTION_CHARACTERS else TEXT_CHARACTERS)
        if text not in self.places:
            self.characters += len(text)
        return self.places.setdefault(text, len(self.places))


def _items_of(run: Run, filtered_by: Mapping[str, str], allowance: int, questions: _Questions) -> Mapping[str, Any]:
    """Return the items of a run that fit: lost ones first, and of each benchmark about as many; longer texts where few runs share."""
    by_benchmark: dict[str, list[Any]] = {}
    for item in sorted(
        run.changed, key=lambda item: (not (item.passed_before and not item.passed_after), item.passed_before == item.passed_after)
    ):
        by_benchmark.setdefault(item.benchmark, []).append(item)
    each = max(1, ITEMS_PER_RUN // max(1, len(by_benchmark)))
    longest = min(max(allowance // (4 * ITEMS_PER_RUN), TEXT_CHARACTERS), WHOLE_CHARACTERS)
    rows: list[list[Any]] = []
    used = 0
    for benchmark, items in by_benchmark.items():
        for item in items[:each]:
            texts = [_cut(text, longest) for text in (item.expected, item.before, item.after)]
            used += sum(map(len, (item.name, *texts))) + 40
            if used > allowance:
                break
            outcomes = (int(item.passed_before), int(item.passed_after))
            rows.append([benchmark, item.name, questions.place_of(item.question), *texts, *outcomes])
    whose = ", ".join(filtered_by[name] for name in ("model", "method", "dataset"))
    return {"name": f"{whose}, seed {run.seed}, {counted(run.rungs[-1], 'edit')}", **filtered_by, "items": rows}


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _table(rows: Sequence[Sequence[str]], label: str) -> str:
    heads = "".join(f'<th scope="col">{escaped(head)}</th>' for head in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])}</tr>' for row in rows[1:]
    )
    return scrolling(f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>", f"table of {label}")
