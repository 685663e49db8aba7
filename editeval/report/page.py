"""One HTML page that needs nothing but a browser: inline figures and styles, no script, no network; light, dark, and narrow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editeval.report.answers import Answer
from editeval.report.figures import NARROW_INCHES, PAGE, curves_figure, retention_figure, svg
from editeval.report.markup import escaped, scrolling
from editeval.report.panels import Panel, overview, panels
from editeval.runner.progress import seconds_text
from editeval.runner.retention import Retention
from editeval.runner.table import Column, ScoreTable, format_number, rung_label
from editeval.types import counted

CSS_FILE = Path(__file__).with_name("page.css")


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """Everything a page shows; sections whose content is empty are left out."""

    title: str
    table: ScoreTable
    manifest: Mapping[str, Any]
    edits: Sequence[Mapping[str, Any]] = ()
    timings: Mapping[str, float] | None = None
    matrices: Sequence[Retention] = ()
    answers: Sequence[Answer] = ()


def page(content: PageContent) -> str:
    """Return the page as one HTML document."""
    every = panels(content.table)
    chosen = overview(every)
    sections = [
        ("curves", "Ability and edit quality", _figures(chosen, "curve")),
        ("retention", "Which edits are still there", _retention(content.matrices)),
        ("numbers", "All numbers", _tables(content.table)),
        ("answers", "What the model writes", _answers(content.answers)),
        ("more", "More curves", _figures([panel for panel in every if panel not in chosen], "more")),
        ("edits", "Edits", _edits(content.edits)),
        ("time", "What took how long", _timings(content.timings or {})),
        ("settings", "Settings", _settings(content.manifest)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{escaped(title)}</a></li>' for name, title, _ in shown)
    parts = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escaped(title)}</h2>\n{body}</section>' for name, title, body in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # else a browser asks the network for one
        f"<title>{escaped(content.title)}</title>\n<style>\n{CSS_FILE.read_text()}</style>\n</head>\n<body>\n"
        f'<header><h1>{escaped(content.title)}</h1>\n{_summary(chosen)}<nav aria-label="sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{parts}\n</main>\n</body>\n</html>\n"
    )


# -- sections --------------------------------------------------------------------------------------------------------------


def _summary(chosen: Sequence[Panel]) -> str:
    """Return one line a curve of the overview: from the unedited model to the last rung."""
    lines = []
    for panel in chosen:
        table = panel.table
        for column in panel.columns:
            first, last = table.cells.get((0, column)), table.cells.get((table.rungs[-1], column))
            if first is not None and last is not None and table.rungs[-1] > 0:
                change = f"{format_number(first.value)} → {format_number(last.value)}"
                note = ' <span class="note">(the unedited model is at chance)</span>' if table.at_chance(column) else ""
                lines.append(f"<li>{escaped(column.benchmark_label)} {escaped(panel.label(column))}: {change}{note}</li>")
    if not lines:
        return ""
    last_rung = rung_label(chosen[0].table.rungs[-1])
    return f"<details open><summary>From the unedited model to {last_rung}</summary><ul>{''.join(lines)}</ul></details>\n"


def _figures(shown: Sequence[Panel], salt: str) -> str:
    figures = [
        _figure(
            svg(curves_figure([panel], theme=PAGE, columns=1, inches=NARROW_INCHES), salt=f"{salt}-{place}"),
            panel.description(),
            _caption(panel),
        )
        for place, panel in enumerate(shown)
    ]
    return f'<div class="figures">{"".join(figures)}</div>\n' if figures else ""


def _caption(panel: Panel) -> str:
    parts = ["Bars: 95% intervals. Dashed: the unedited model."]
    if any(panel.table.chance(column) is not None for column in panel.columns):
        parts.append("Dotted: chance.")
    if any(panel.table.at_chance(column) for column in panel.columns):
        parts.append("* The unedited model is not above chance, so this curve cannot show damage.")
    return " ".join(parts)


def _figure(picture: str, description: str, caption: str) -> str:
    labelled = picture.replace("<svg ", f'<svg role="img" aria-label="{escaped(description)}" ', 1)
    return f"<figure>{labelled}<figcaption>{escaped(caption)}</figcaption></figure>\n"


def _retention(matrices: Sequence[Retention]) -> str:
    caption = "A row is a fact in editing order, a column a number of edits. Above the line the fact has been edited."
    figures = [
        _figure(svg(retention_figure(matrix, theme=PAGE), salt=f"retention-{place}"), matrix.description(), caption)
        for place, matrix in enumerate(matrices)
    ]
    return f'<div class="figures">{"".join(figures)}</div>\n' if figures else ""


def _tables(table: ScoreTable) -> str:
    parts = []
    for label in table.benchmarks():
        part = table.only(column for column in table.columns if column.benchmark_label == label)
        heads = "".join(_column_head(part, column) for column in part.columns)
        rows = "".join(_score_row(row) for row in part.rows())
        head = f'<thead><tr><th scope="col">model</th>{heads}</tr></thead>'
        body = f"<table><caption>{escaped(label)}</caption>{head}<tbody>{rows}</tbody></table>"
        parts.append(scrolling(body, f"scores of {label}"))
    if any(table.at_chance(column) for column in table.columns):
        parts.append('<p class="note">* the unedited model is not above chance here, so this number cannot show damage</p>')
    return "\n".join(parts)


def _column_head(part: ScoreTable, column: Column) -> str:
    several_tasks = len({other.task for other in part.columns}) > 1
    name = " ".join(filter(None, (column.task_label if several_tasks else "", column.metric))).replace("_", " ")
    mark = "*" if part.at_chance(column) else ""
    return f'<th scope="col">{escaped(name)}{mark}<small>{escaped(column.protocol.replace("_", " "))}</small></th>'


def _score_row(row: Sequence[str]) -> str:
    kind = f' class="{row[0]}"' if row[0] in ("chance", "unedited") else ""
    cells = "".join(f"<td>{escaped(value)}</td>" for value in row[1:])
    return f'<tr{kind}><th scope="row">{escaped(row[0])}</th>{cells}</tr>'


def _answers(answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    rows = "".join(
        f"<tr><td>{escaped(answer.prompt)}</td><td>{escaped(answer.expected)}</td><td>{escaped(answer.unedited)}</td>"
        f'<td>{escaped(answer.edited)}</td><td class="{"yes" if answer.passed else "no"}">{"yes" if answer.passed else "no"}</td></tr>'
        for answer in answers
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("prompt", "edited to", "unedited model", "edited model", "there"))
    table = (
        f'<table class="text"><caption>{escaped(answers[0].state)}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )
    return scrolling(table, "generated answers")


def _edits(edits: Sequence[Mapping[str, Any]]) -> str:
    if not edits:
        return ""
    names = list(dict.fromkeys(name for edit in edits for name in edit.get("diagnostics", {})))
    signs = [name for name in ("weight_norm_ratio", "canary_ratio") if any(name in edit for edit in edits)]
    heads = "".join(f'<th scope="col">{escaped(name.replace("_", " "))}</th>' for name in ("edit", "facts", "seconds", *signs, *names))
    rows = []
    for edit in edits:
        numbers = [*(edit.get(name) for name in signs), *(edit.get("diagnostics", {}).get(name) for name in names)]
        cells = "".join(f"<td>{_number(number)}</td>" for number in (edit["seconds"], *numbers))
        facts = ", ".join(edit["request_ids"])
        rows.append(f'<tr><th scope="row">{edit["step"]}</th><td>{escaped(facts)}</td>{cells}</tr>')
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    mean = sum(float(edit["seconds"]) for edit in edits) / len(edits)
    summary = f"{counted(len(edits), 'edit')}, {seconds_text(mean)} each on average"
    return f"<details><summary>{summary}</summary>{scrolling(table, 'edits')}</details>"


def _timings(timings: Mapping[str, float]) -> str:
    if not timings:
        return ""
    ordered = [*sorted(timings.items(), key=lambda item: -item[1]), ("total, over all launches", sum(timings.values()))]
    rows = "".join(f'<tr><th scope="row">{escaped(name)}</th><td>{seconds_text(seconds)}</td></tr>' for name, seconds in ordered)
    return scrolling(
        f'<table><thead><tr><th scope="col">work</th><th scope="col">time</th></tr></thead><tbody>{rows}</tbody></table>', "timings"
    )


def _settings(manifest: Mapping[str, Any]) -> str:
    parts = []
    plain = {name: value for name, value in manifest.items() if not isinstance(value, (Mapping, list))}
    if plain:
        rows = "".join(f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>' for name, value in plain.items())
        parts.append(scrolling(f'<table class="text"><tbody>{rows}</tbody></table>', "identity of the run"))
    for name, value in manifest.items():
        if name not in plain:
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
            parts.append(f'<details><summary>{escaped(name)}</summary><pre tabindex="0">{escaped(text)}</pre></details>')
    return "\n".join(parts)


# -- pieces ----------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    return format_number(None if value is None else float(value))
