"""Which charts answer which question: the paper's figures, with edit quality beside ability in every one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

from editeval.report.charts import CellMap, Chart, Curve, Panel, Point, finite
from editeval.report.findings import broken_texts
from editeval.report.published import SOURCE, published_curve
from editeval.report.series import Series
from editeval.report.statistics import Estimate, Interval
from editeval.report.study import Run, Studies, monitored
from editeval.runner.table import NORMAL_95, Column
from editeval.types import Score

MAX_MONITOR_POINTS = 40
BANDS = "Bands: 95% intervals, over items and, where a series has several seeds, over orders of edits; hollow: no bounds."
PUBLISHED = f"Dotted with rings: {SOURCE}, not ours."
RETAINED = "share of ability kept"


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
    found += [_artefact_chart(model, method, series) for model in models for method in dict.fromkeys(_base(one) for one in series)]
    return tuple(chart for chart in found if chart is not None and chart.panels)


# -- the five questions ----------------------------------------------------------------------------------------------------


def _edits_chart(model: str, mine: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ1, figure 2 of the paper: each benchmark against the number of edits, a curve a method."""
    panels = [*_quality_panels(mine, colours), _mean_panel(mine, colours)]
    panels += [_score_panel(column, mine, colours) for column in _columns(one.ability for one in mine)]
    return _chart("rq1", model, f"{model}: number of edits", panels, f"{BANDS} Dotted line: chance. {PUBLISHED}")


def _siblings_chart(pair: Mapping[str, str], series: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ2, figure 3: base solid, tuned dashed."""
    both = [one for one in series if one.model in (pair["base"], pair["tuned"])]
    if {one.model for one in both} != {pair["base"], pair["tuned"]}:
        return None
    dashed = {pair["tuned"]}
    panels = [*_quality_panels(both, colours, dashed=dashed), _mean_panel(both, colours, dashed=dashed)]
    panels += [_score_panel(column, both, colours, dashed=dashed) for column in _columns(one.ability for one in both)]
    return _chart("rq2", pair["family"], f"{pair['family']}: base (solid) and instruction-tuned (dashed)", panels, BANDS)


def _scale_chart(family: str, sizes: Mapping[str, float], series: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ3, figure 4: against the size of the model, one panel a number of edits."""
    mine = [one for one in series if one.model in sizes and one.mean]
    if len({one.model for one in mine}) < 2:
        return None
    panels = []
    for rung in sorted({rung for one in mine for rung in one.mean}):
        kept = {_key(one): one.mean[rung] for one in mine if rung in one.mean}
        there = {_key(one): one.efficacy[rung] for one in mine if rung in one.efficacy}
        panels.append(_size_panel(f"efficacy after {rung}", "facts there", mine, there, sizes, colours, quality=True))
        panels.append(_size_panel(f"mean ability after {rung}", RETAINED, mine, kept, sizes, colours))
    return _chart("rq3", family, f"{family}: size of the model", panels, BANDS)


def _aspects_chart(model: str, mine: Sequence[Series], known: Studies) -> Chart | None:
    """RQ4, figure 5: one panel a method, one curve a benchmark, all as the share kept; efficacy dashed beside them."""
    panels = []
    names = dict.fromkeys(column.name for one in mine for column in one.ability if one.can_show_damage(column))
    colours = {name: place + 1 for place, name in enumerate(names)}
    for one in mine:
        curves = [_curve(one, one.efficacy, "efficacy", 0, dashed=True)]
        for column in one.ability:
            if one.can_show_damage(column):
                points = {rung: found.interval for rung in one.rungs if (found := one.retained(rung, column)) is not None}
                curves.append(_curve(one, {0: _whole(), **points}, f"{_short(column)} · {known.aspect(column)}", colours[column.name]))
        if len(curves) > 1:
            panels.append(Panel(title=f"{one.method}, {one.dataset}", unit=RETAINED, curves=_drawn(curves), levels=(("", 0.9),)))
    caption = f"{BANDS} Benchmarks on which the unedited model is at chance cannot show damage and are left out. Dashed: efficacy."
    return _chart("rq4", model, f"{model}: aspects of ability", panels, caption)


def _safety_chart(model: str, mine: Sequence[Series], colours: Mapping[str, int]) -> Chart | None:
    """RQ5, figure 6: safety, read only where ability and edits are there."""
    columns = _columns(one.safety for one in mine)
    if not columns:
        return None
    panels = [*_quality_panels(mine, colours), _mean_panel(mine, colours)]
    panels += [_score_panel(column, mine, colours) for column in columns]
    caption = f"{BANDS} A change counts only where mean ability is still there: a broken model gives one answer to everything. {PUBLISHED}"
    return _chart("rq5", model, f"{model}: safety", panels, caption)


# -- artefacts -------------------------------------------------------------------------------------------------------------


def _artefact_chart(model: str, method: str, series: Sequence[Series]) -> Chart | None:
    """One method under several settings: what of a result is the method's, and what that of one code's way to run it."""
    mine = [one for one in series if one.model == model and _base(one) == method]
    if len({one.method for one in mine}) < 2:
        return None
    apart = {name: place for place, name in enumerate(dict.fromkeys(one.method for one in mine))}
    panels = [*_quality_panels(mine, apart), _mean_panel(mine, apart)]
    norms = [_plain_curve(one, _norms(one), apart[one.method]) for one in mine]
    panels.append(Panel(title="norm of edited weights", unit="times unedited", curves=_drawn(norms), share=False, log=True))
    # What the curves have in common stands in the title: a name of method, settings and values would be cut.
    settings = {one.method: re.findall(r"([\w.]+)=([^,)]*)", one.method) for one in mine}
    values = {name: ", ".join(value for _, value in pairs) or name for name, pairs in settings.items()}
    shown = [replace(panel, curves=tuple(replace(curve, label=values[curve.label]) for curve in panel.curves)) for panel in panels]
    names = ", ".join(dict.fromkeys(name for pairs in settings.values() for name, _ in pairs)) or "several settings"
    caption = f"{BANDS} The same model and facts; a curve is named after its values of {names}."
    return _chart("artefacts", f"{model}-{method}", f"{model}: {method} by {names}", shown, caption)


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
    """Weight norms, perplexity and degenerate output: what warns before a benchmark does."""
    panels = list(_quality_panels(mine, colours)[:1])
    norms = [_plain_curve(one, _norms(one), colours[one.method]) for one in mine]
    panels.append(Panel(title="norm of edited weights", unit="times unedited", curves=_drawn(norms), share=False, log=True))
    for column in dict.fromkeys(column for one in mine for column in monitored(one.runs[0])):
        curves = [_plain_curve(one, _values(one, column), colours[one.method]) for one in mine]
        logarithmic = column.metric == "perplexity"
        title = f"{_short(column)} {column.metric.replace('_', ' ')}"
        panels.append(Panel(title=title, unit="lower is better", curves=_drawn(curves), share=False, log=logarithmic))
    broken = [_plain_curve(one, broken_texts(one), colours[one.method]) for one in mine]
    panels.append(Panel(title="degenerate texts", unit="empty or repeating", curves=_drawn(broken)))
    constant = [_plain_curve(one, _commonest(one), colours[one.method]) for one in mine]
    panels.append(Panel(title="commonest choice", unit="share of answers", curves=_drawn(constant)))
    caption = "Cheap signs of a broken model. Means over seeds; a model that always makes the same choice is at 1 in the last panel."
    return _chart("monitors", model, f"{model}: early warnings", panels, caption)


def _norms(one: Series) -> dict[int, float]:
    found: dict[int, list[float]] = {0: [1.0]}
    for run in one.runs:
        step = max(1, len(run.edits) // MAX_MONITOR_POINTS)
        for edit in (*run.edits[::step], *run.edits[-1:]):
            if edit.get("weight_norm_ratio") is not None:
                found.setdefault(int(edit["num_edits"]), []).append(float(edit["weight_norm_ratio"]))
    return {rung: fmean(values) for rung, values in sorted(found.items())} if len(found) > 1 else {}


def _values(one: Series, column: Column) -> dict[int, float]:
    if column in one.mixed:
        return {}
    rungs = (0, *one.rungs)
    values = {rung: [value for run in one.runs if (value := run.table.value(rung, column)) is not None] for rung in rungs}
    return {rung: fmean(found) for rung, found in values.items() if found}


def _commonest(one: Series) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for run in one.runs:
        for (rung, _), signs in run.degenerate.items():
            if signs.commonest_choice is not None:
                found.setdefault(rung, []).append(signs.commonest_choice)
    return {rung: fmean(values) for rung, values in sorted(found.items())}


# -- panels ----------------------------------------------------------------------------------------------------------------


def _quality_panels(mine: Sequence[Series], colours: Mapping[str, int], *, dashed: Iterable[str] = ()) -> list[Panel]:
    """Return efficacy and locality: whether the edits are there, and what they disturb."""
    panels = []
    for metric, unit in (("efficacy", "facts there"), ("locality", "answers unchanged")):
        curves: list[Curve] = []
        for one in mine:
            curves.append(_curve(one, one.quality(metric), one.method, colours[one.method], dashed=one.model in set(dashed)))
            for run in one.runs:
                column = run.edit_column(metric)
                if column is not None:
                    curves.append(_seed_curve(one, run, column, colours, dashed))
        panels.append(Panel(title=f"{metric}, all edits so far", unit=unit, curves=_drawn(curves), quality=True))
    return [panel for panel in panels if panel.curves]


def _mean_panel(mine: Sequence[Series], colours: Mapping[str, int], *, dashed: Iterable[str] = ()) -> Panel:
    curves = [
        _curve(one, {0: _whole(), **one.mean}, one.method, colours[one.method], dashed=one.model in set(dashed)) for one in mine if one.mean
    ]
    protocols = ", ".join(dict.fromkeys(one.protocol for one in mine if one.protocol))
    return Panel(title=f"mean ability kept ({protocols})", unit=RETAINED, curves=_drawn(curves), levels=(("", 0.9), ("", 0.5)))


def _score_panel(column: Column, mine: Sequence[Series], colours: Mapping[str, int], *, dashed: Iterable[str] = ()) -> Panel:
    curves: list[Curve] = []
    levels: dict[float, None] = {}
    for one in mine:
        if column not in one.columns:
            continue
        curves.append(_curve(one, _scores(one, column), one.method, colours[one.method], dashed=one.model in set(dashed)))
        curves += [_seed_curve(one, run, column, colours, dashed) for run in one.runs]
        rows = published_curve(one.model, one.runs[0].method, one.dataset, column.benchmark, column.protocol)
        points = tuple(Point(row.num_edits, row.value, row.value, row.value) for row in rows if row.num_edits <= max(one.rungs, default=0))
        curves.append(_named(one, one.method, points, colours[one.method], published=True))
        chance = one.runs[0].table.chance(column)
        levels |= {chance: None} if chance is not None else {}
    at_chance = not any(one.can_show_damage(column) for one in mine if column in one.columns)
    title = f"{_short(column)} ({column.protocol})" + (" *" if at_chance else "")
    note = "* the unedited model is not above chance, so this panel cannot show damage" if at_chance else ""
    return Panel(
        title=title,
        unit=column.metric.replace("_", " "),
        curves=_drawn(curves),
        levels=tuple(("chance", level) for level in levels),
        note=note,
    )


def _size_panel(
    title: str,
    unit: str,
    mine: Sequence[Series],
    values: Mapping[tuple[str, str, str], Interval],
    sizes: Mapping[str, float],
    colours: Mapping[str, int],
    *,
    quality: bool = False,
) -> Panel:
    curves = []
    for method, dataset in dict.fromkeys((one.method, one.dataset) for one in mine):
        found = [
            (sizes[one.model], values[_key(one)]) for one in mine if (one.method, one.dataset) == (method, dataset) and _key(one) in values
        ]
        points = finite([Point(size, value.value, value.low, value.high) for size, value in sorted(found, key=lambda pair: pair[0])])
        curves.append(Curve(label=method, model="", method=method, dataset=dataset, points=points, colour=colours[method]))
    return Panel(title=title, unit=unit, curves=_drawn(curves), axis="size", quality=quality)


# -- curves ----------------------------------------------------------------------------------------------------------------


def _curve(one: Series, values: Mapping[int, Interval], label: str, colour: int, *, dashed: bool = False) -> Curve:
    points = finite([Point(rung, value.value, value.low, value.high) for rung, value in sorted(values.items())])
    return Curve(label=label, model=one.model, method=one.method, dataset=one.dataset, points=points, colour=colour, dashed=dashed)


def _plain_curve(one: Series, values: Mapping[int, float], colour: int) -> Curve:
    return _named(one, one.method, finite([Point(rung, value, value, value) for rung, value in values.items()]), colour)


def _named(one: Series, label: str, points: tuple[Point, ...], colour: int, *, published: bool = False) -> Curve:
    return Curve(label=label, model=one.model, method=one.method, dataset=one.dataset, points=points, colour=colour, published=published)


def _seed_curve(one: Series, run: Run, column: Column, colours: Mapping[str, int], dashed: Iterable[str]) -> Curve:
    scores = [score for rung in run.rungs if (score := run.table.cells.get((rung, column))) is not None]
    points = finite([_point(score) for score in scores])
    is_dashed = one.model in set(dashed)
    name = one.method
    return Curve(
        label=name,
        model=one.model,
        method=name,
        dataset=one.dataset,
        points=points,
        seed=run.seed,
        colour=colours[name],
        dashed=is_dashed,
    )


def _scores(one: Series, column: Column) -> dict[int, Interval]:
    """Return the plain score by rung, a mean over orders; intervals over items and, where there are several, over orders."""
    found: dict[int, Interval] = {}
    for rung in (0, *one.rungs):
        scores = [score for run in one.runs if (score := run.table.cells.get((rung, column))) is not None]
        if scores:
            value = fmean(score.value for score in scores)
            over_items = fmean(score.stderr or 0.0 for score in scores) ** 2
            interval = Estimate(value=value, orders=tuple(score.value for score in scores), extra_variance=over_items).interval()
            found[rung] = Interval(value=value, low=max(0.0, interval.low), high=min(1.0, interval.high))
    return found


def _point(score: Score) -> Point:
    half = NORMAL_95 * (score.stderr or 0.0)
    return Point(score.num_edits, score.value, max(0.0, score.value - half), min(1.0, score.value + half))


def _drawn(curves: Iterable[Curve]) -> tuple[Curve, ...]:
    return tuple(curve for curve in curves if curve.points)


def _columns(found: Iterable[Sequence[Column]]) -> list[Column]:
    return list(dict.fromkeys(column for columns in found for column in columns))


def _chart(question: str, subject: str, title: str, panels: Sequence[Panel | CellMap], caption: str) -> Chart | None:
    kept = tuple(panel for panel in panels if isinstance(panel, CellMap) or panel.curves)
    name = f"{question}-{re.sub(r'[^a-z0-9]+', '-', subject.lower()).strip('-')}"
    notes = " ".join(dict.fromkeys(panel.note for panel in kept if isinstance(panel, Panel) and panel.note))
    return Chart(name=name, question=question, title=title, panels=kept, caption=f"{caption} {notes}".strip()) if kept else None


def _whole() -> Interval:
    return Interval(value=1.0, low=1.0, high=1.0)


def _key(one: Series) -> tuple[str, str, str]:
    return one.model, one.method, one.dataset


def _short(column: Column) -> str:
    """Return benchmark and task, no word twice and none that the protocol says anyway."""
    words = re.split(r"[\s_-]+", f"{column.benchmark} {column.task}")
    said = set(re.split(r"[\s_-]+", column.protocol))
    return " ".join(word for word in dict.fromkeys(words) if word not in said) or column.benchmark
