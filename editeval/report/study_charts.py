"""Which charts answer which question: the paper's figures, with edit quality beside ability in every one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from editeval.report.charts import CellMap, Chart, Curve, Panel, name_of
from editeval.report.findings import broken_texts, sign_by_run
from editeval.report.findings_safety import safety_counts
from editeval.report.published import SOURCE
from editeval.report.series import Series
from editeval.report.study import Studies, monitored
from editeval.report.study_curves import curve_of, drawn, monitor_curve, score_curve, scores_of, whole
from editeval.report.study_panels import (
    RETAINED,
    benchmark_by_size,
    canary_panel,
    key_of,
    mean_panel,
    norm_panel,
    of_edits,
    quality_panels,
    score_panel,
    short_name,
    size_panel,
    update_norm,
)
from editeval.runner.table import Column

BANDS = "Bands: 95% intervals, over items and, where a series has several seeds, over orders of edits; hollow: no bounds."
PUBLISHED_CODE = "published code"  # the name of a curve of settings that reproduce a fault of one, or that one was run with
PUBLISHED = f"Dotted with rings: {SOURCE}, not ours."


def charts(series: Sequence[Series], known: Studies) -> tuple[Chart, ...]:
    """Return every chart, question by question."""
    colours = {method: place for place, method in enumerate(dict.fromkeys(one.method for one in series))}
    models = dict.fromkeys(one.model for one in series)
    by_model = {model: [one for one in series if one.model == model] for model in models}
    found: list[Chart | None] = []
    found += [_edits_chart(model, mine, colours) for model, mine in by_model.items()]
    found += [_siblings_chart(pair, series, colours) for pair in known.pairs]
    found += [_scale_chart(family, sizes, series, colours) for family, sizes in known.families.items()]
    found += [_aspects_chart(model, mine, known) for model, mine in by_model.items()]
    found += [_safety_chart(model, mine, colours) for model, mine in by_model.items()]
    found += [_retention_chart(model, mine) for model, mine in by_model.items()]
    found += [_monitor_chart(model, mine, colours) for model, mine in by_model.items()]
    for model, mine in by_model.items():
        found += [_settings_chart(model, method, mine) for method in dict.fromkeys(_base(one) for one in mine)]
        found += [_comparison_chart(model, methods, mine) for methods in known.comparisons]
        found += [_forms_chart(model, benchmarks, mine) for benchmarks in known.forms]
    return tuple(chart for chart in found if chart is not None and chart.panels)


# -- the five questions ----------------------------------------------------------------------------------------------------


def _edits_chart(model: str, mine: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ1, figure 2 of the paper: each benchmark against the number of edits, a curve a method."""
    panels = [*quality_panels(mine, colours), mean_panel(mine, colours)]
    panels += [score_panel(column, mine, colours) for column in _columns(one.ability for one in mine)]
    return _chart("rq1", model, f"{model}: number of edits", panels, f"{BANDS} Dotted line: chance. {PUBLISHED}")


def _siblings_chart(pair: Mapping[str, str], series: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ2, figure 3: base solid, tuned dashed."""
    both = [one for one in series if one.model in (pair["base"], pair["tuned"])]
    if {one.model for one in both} != {pair["base"], pair["tuned"]}:
        return None
    dashed = {pair["tuned"]}
    panels = [*quality_panels(both, colours, dashed=dashed), mean_panel(both, colours, dashed=dashed)]
    panels += [score_panel(column, both, colours, dashed=dashed) for column in _columns(one.ability for one in both)]
    title = f"{pair['family']}: base (solid) and instruction-tuned (dashed)"
    return _chart("rq2", pair["family"], title, panels, f"{BANDS} {PUBLISHED} Longer dashes: of the instruction-tuned model.")


def _scale_chart(family: str, sizes: Mapping[str, float], series: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ3, figure 4: against the size of the model, one panel a benchmark and number of edits."""
    mine = [one for one in series if one.model in sizes and (one.mean or one.efficacy)]
    if len({one.model for one in mine}) < 2:
        return None
    panels = []
    for rung in sorted({rung for one in mine for rung in (*one.mean, *one.efficacy)} - {0}):
        kept = {key_of(one): one.mean[rung] for one in mine if rung in one.mean}
        there = {key_of(one): one.efficacy[rung] for one in mine if rung in one.efficacy}
        panels.append(size_panel(f"efficacy after {rung}", "facts there", mine, there, sizes, colours, quality=True))
        panels.append(size_panel(f"mean ability after {rung}", RETAINED, mine, kept, sizes, colours))
        panels += [benchmark_by_size(column, rung, mine, sizes, colours) for column in _columns(one.ability for one in mine)]
    return _chart("rq3", family, f"{family}: size of the model", panels, f"{BANDS} Dotted line: chance. {PUBLISHED}")


def _aspects_chart(model: str, mine: Sequence[Series], known: Studies) -> Chart | None:
    """RQ4, figure 5: one panel a method, one curve a benchmark, all as the share kept; efficacy dashed beside them."""
    panels = []
    columns = {column.name: column for one in mine for column in one.ability if one.can_show_damage(column)}
    colours = {name: place + 1 for place, name in enumerate(columns)}
    aspects: dict[str, list[str]] = {}
    for column in columns.values():
        aspects.setdefault(known.aspect(column), []).append(short_name(column))
    for one in mine:
        curves = [curve_of(one, one.efficacy, "efficacy", 0, dashed=True)]
        for column in one.ability:
            if one.can_show_damage(column):
                points = {rung: found.interval for rung in one.rungs if (found := one.retained(rung, column)) is not None}
                curves.append(curve_of(one, {0: whole(), **points}, short_name(column), colours[column.name]))
        if len(curves) > 1:
            panels.append(Panel(title=f"{one.method}, {one.dataset}", unit=RETAINED, curves=drawn(curves), levels=(("", 0.9),)))
    asked = ", ".join(f"{aspect} ({', '.join(names)})" for aspect, names in aspects.items())
    caption = f"{BANDS} Asked: {asked}. Left out: benchmarks on which the unedited model is at chance. Dashed: efficacy."
    return _chart("rq4", model, f"{model}: aspects of ability", panels, caption)


def _safety_chart(model: str, mine: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ5, figure 6: safety, read only where ability and edits are there."""
    columns = _columns(one.safety for one in mine)
    if not columns:
        return None
    panels = [*quality_panels(mine, colours), mean_panel(mine, colours)]
    panels += [_only_counted(score_panel(column, mine, colours), mine) for column in columns]
    caption = (
        f"{BANDS} In the panels of safety hollow points do not count: edits or 90% of mean ability are not surely there, or much of what "
        f"it writes is empty, and a broken model gives one answer to everything. {PUBLISHED}"
    )
    return _chart("rq5", model, f"{model}: safety", panels, caption)


def _only_counted(panel: Panel, mine: Sequence[Series]) -> Panel:
    """Mark the points of a panel of safety that the verdict does not count."""
    counted = {key_of(one): {0, *(rung for rung in one.rungs if safety_counts(one, rung))} for one in mine}

    def marked(curve: Curve) -> Curve:
        rungs = counted[curve.model, curve.method, curve.dataset]
        return replace(curve, points=tuple(point._replace(counts=point.x in rungs) for point in curve.points))

    return replace(panel, curves=tuple(curve if curve.published else marked(curve) for curve in panel.curves))


# -- artefacts -------------------------------------------------------------------------------------------------------------


def _settings_chart(model: str, method: str, series: Sequence[Series]) -> Chart | None:
    """One method under several settings: what of a result is the method's, and what that of one code's way to run it."""
    mine = [one for one in series if _base(one) == method]
    if len({one.method for one in mine}) < 2:
        return None
    # What the curves have in common stands in the title: a name of method, settings and values would be cut.
    names = ", ".join(dict.fromkeys(name for one in mine for name in one.settings)) or "several settings"
    published = {one.method: found for one in mine if (found := _published_settings(one))}
    faults = dict.fromkeys(one.method for one in mine if one.reproduces_a_fault)
    values = {}
    for one in mine:
        others = [value for name, value in one.settings.items() if name not in published.get(one.method, {})]
        told = [PUBLISHED_CODE] if one.method in faults else [*([PUBLISHED_CODE] if one.method in published else []), *others]
        values[one.method] = ", ".join(told) or one.method
    shown = [
        replace(panel, curves=tuple(replace(curve, label=values[curve.label]) for curve in panel.curves)) for panel in _update_panels(mine)
    ]
    reproduced = f" {PUBLISHED_CODE}: {', '.join(faults)}, which reproduces its fault." if faults else ""
    for name, settings in published.items():
        reproduced += f" {PUBLISHED_CODE}: {name}, as it was run with {', '.join(f'{key} {value}' for key, value in settings.items())}."
    caption = f"{BANDS} The same model and facts; a curve is named after its values of {names}.{reproduced}"
    return _chart("artefacts", f"{model}-{method}", f"{model}: {method} by {names}", shown, caption)


def _published_settings(one: Series) -> Mapping[str, Any]:
    """Return the settings that a published code ran the method with, if the series has them and the chart compares any of them."""
    settings = one.runs[0].published_settings
    return settings if any(name in one.settings for name in settings) else {}


def _comparison_chart(model: str, methods: Sequence[str], series: Sequence[Series]) -> Chart | None:
    """Several methods on the same facts: is a flat curve robust, or are its edits or updates small?"""
    mine = [one for one in series if _base(one) in methods]
    if {_base(one) for one in mine} != set(methods):
        return None
    title = f"{model}: {' beside '.join(methods)}"
    caption = f"{BANDS} A curve that stays flat because little was written is no robust one: look at efficacy and at the updates."
    return _chart("artefacts", f"{model}-{'-'.join(methods)}", title, _update_panels(mine), caption)


def _update_panels(mine: Sequence[Series]) -> list[Panel]:
    """Return edit quality, mean ability, and how large the updates and the edited weights are."""
    apart = {name: place for place, name in enumerate(dict.fromkeys(one.method for one in mine))}
    updates = [monitor_curve(one, of_edits(one, update_norm), apart[one.method], log=True) for one in mine]
    size = Panel(title="size of an edit's update", unit="norm", curves=drawn(updates), share=False, log=True)
    return [*quality_panels(mine, apart), mean_panel(mine, apart), norm_panel(mine, apart), size]


def _forms_chart(model: str, benchmarks: Sequence[str], series: Sequence[Series]) -> Chart | None:
    """The same questions in several forms: a broken model scores nothing by what it writes, and by likelihood what guessing does."""
    panels = []
    for one in series:
        columns = [column for name in benchmarks for column in one.ability if column.benchmark == name]
        if len({column.benchmark for column in columns}) < 2:
            continue
        curves = [curve_of(one, one.efficacy, "efficacy", 0, dashed=True)]
        curves += [curve_of(one, scores_of(one, column), column.protocol, benchmarks.index(column.benchmark) + 1) for column in columns]
        chances = dict.fromkeys(chance for column in columns if (chance := one.runs[0].table.chance(column)) is not None)
        levels = tuple(("chance", chance) for chance in chances)
        panels.append(Panel(title=f"{one.method}, {one.dataset}", unit="score", curves=drawn(curves), levels=levels, quality=True))
    caption = (
        f"{BANDS} By what the model writes and by likelihood: a score of 0 beside one at chance is a model that cannot say its answer."
    )
    return _chart("artefacts", f"{model}-{benchmarks[0]}-forms", f"{model}: {benchmarks[0]} and its other forms", panels, caption)


def _base(one: Series) -> str:
    return one.runs[0].method


# -- retention, monitors ---------------------------------------------------------------------------------------------------


def _retention_chart(model: str, mine: Sequence[Series]) -> Chart | None:
    panels = [found for one in mine if not one.is_control and (found := _retention_map(one)) is not None]
    caption = "Rows: facts by the place at which they were edited. Cells: share of them that the model still writes by itself."
    return _chart("retention", model, f"{model}: which edits are still there", panels, caption)


def _retention_map(one: Series) -> CellMap | None:
    rungs = [rung for rung in one.rungs if any(rung in run.retention for run in one.runs)]
    if not rungs:
        return None
    edges = [0, *rungs]
    values: list[tuple[float | None, ...]] = []
    for low, high in pairwise(edges):
        cells: list[float | None] = []
        for rung in rungs:
            found = [value for run in one.runs for place, value in run.retention.get(rung, {}).items() if low < place <= high]
            cells.append(fmean(found) if found and rung >= high else None)
        values.append(tuple(cells))
    names = tuple(f"edit {high}" if high == low + 1 else f"edits {low + 1}–{high}" for low, high in pairwise(edges))
    columns = tuple(map(str, rungs))
    head = {"model": one.model, "method": one.method, "dataset": one.dataset}
    return CellMap(title=f"{one.method}, {one.dataset}", **head, rows=names, columns=columns, values=tuple(values))


def _monitor_chart(model: str, mine: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """Weight norms, perplexities and degenerate output: what warns before a benchmark does."""
    panels = list(quality_panels(mine, colours)[:1])
    panels += [norm_panel(mine, colours), canary_panel(mine, colours)]
    for column in dict.fromkeys(column for one in mine for column in monitored(one.runs[0])):
        logarithmic = column.metric == "perplexity"
        curves = [score_curve(one, column, colours[one.method], log=logarithmic) for one in mine]
        title = " ".join(dict.fromkeys(f"{short_name(column)} {column.metric.replace('_', ' ')}".split()))
        panels.append(Panel(title=title, unit="lower is better", curves=drawn(curves), share=False, log=logarithmic))
    broken = [curve_of(one, broken_texts(one), one.method, colours[one.method]) for one in mine]
    panels.append(Panel(title="degenerate texts", unit="empty or repeating", curves=drawn(broken)))
    constant = [monitor_curve(one, sign_by_run(one, lambda signs: signs.commonest_choice), colours[one.method]) for one in mine]
    panels.append(Panel(title="commonest choice", unit="share of answers", curves=drawn(constant)))
    caption = (
        "Cheap signs of a broken model; one that always makes the same choice is at 1 in the last panel. Means over orders of edits with "
        "their 95% intervals, of logarithms where the axis is logarithmic, which may leave the axes; perplexity's are over tokens too, "
        "those of degenerate texts over texts."
    )
    return _chart("monitors", model, f"{model}: early warnings", panels, caption)


def _columns(found: Iterable[Sequence[Column]]) -> list[Column]:
    return list(dict.fromkeys(column for columns in found for column in columns))


def _chart(question: str, subject: str, title: str, panels: Sequence[Panel | CellMap], caption: str) -> Chart | None:
    kept = tuple(panel for panel in panels if isinstance(panel, CellMap) or panel.curves)
    notes = " ".join(dict.fromkeys(note for panel in kept if isinstance(panel, Panel) for note in panel.notes))
    told = f"{caption} {notes}".strip()
    return Chart(name=name_of(question, subject), question=question, title=title, panels=kept, caption=told) if kept else None
