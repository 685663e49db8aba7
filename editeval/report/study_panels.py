"""The panels that charts are made of: edit quality, ability, sizes of models, and what the edit log says of weights and updates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from editeval.report.charts import Curve, Panel, Point, finite
from editeval.report.intervals import Interval
from editeval.report.published import PublishedRow, published_curve
from editeval.report.series import Series
from editeval.report.study_curves import curve_of, doubts_of, drawn, monitor_curve, published_points, scores_of, seed_curve, whole
from editeval.runner.table import Column

MAX_MONITOR_POINTS = 40
RETAINED = "share of ability kept"
OfEdit = Callable[[Mapping[str, Any]], float | None]  # a number of a row of the edit log


def quality_panels(mine: Sequence[Series], colours: Mapping[str, int], *, dashed: Iterable[str] = ()) -> list[Panel]:
    """Return efficacy and locality: whether the edits are there, and what they disturb."""
    panels = []
    for metric, unit in (("efficacy", "facts there"), ("locality", "answers unchanged")):
        curves: list[Curve] = []
        for one in mine:
            curves.append(curve_of(one, one.quality(metric), one.method, colours[one.method], dashed=one.model in set(dashed)))
            for run in one.runs:
                column = run.edit_column(metric)
                if column is not None:
                    curves.append(seed_curve(one, run, column, colours, dashed))
        panels.append(Panel(title=f"{metric}, all edits so far", unit=unit, curves=drawn(curves), quality=True))
    return [panel for panel in panels if panel.curves]


def mean_panel(mine: Sequence[Series], colours: Mapping[str, int], *, dashed: Iterable[str] = ()) -> Panel:
    """Return the mean share of ability kept, with the marks of n90 and n50."""
    curves = [
        curve_of(one, {0: whole(), **one.mean}, one.method, colours[one.method], dashed=one.model in set(dashed))
        for one in mine
        if one.mean
    ]
    protocols = ", ".join(dict.fromkeys(one.protocol for one in mine if one.protocol))
    return Panel(title=f"mean ability kept ({protocols})", unit=RETAINED, curves=drawn(curves), levels=(("", 0.9), ("", 0.5)))


def score_panel(column: Column, mine: Sequence[Series], colours: Mapping[str, int], *, dashed: Iterable[str] = ()) -> Panel:
    """Return one benchmark: every series with its orders, what is published of it, and chance."""
    curves: list[Curve] = []
    doubts: tuple[str, ...] = ()
    for one in mine:
        if column not in one.columns:
            continue
        curves.append(curve_of(one, scores_of(one, column), one.method, colours[one.method], dashed=one.model in set(dashed)))
        curves += [seed_curve(one, run, column, colours, dashed) for run in one.runs]
        rows = _published(one, column)
        curves.append(published_points(one, rows, colours[one.method], dashed=one.model in set(dashed)))
        doubts += doubts_of(rows)
    asked = [one for one in mine if column in one.columns]
    at_chance = not any(one.can_show_damage(column) for one in asked)
    title = f"{short_name(column)} ({column.protocol})" + (" *" if at_chance else "")
    note = ["* the unedited model is not above chance, so this panel cannot show damage"] if at_chance else []
    unit = column.metric.replace("_", " ")
    return Panel(title=title, unit=unit, curves=drawn(curves), levels=_chances(asked, column), notes=(*note, *doubts))


def benchmark_by_size(column: Column, rung: int, mine: Sequence[Series], sizes: Mapping[str, float], colours: Mapping[str, int]) -> Panel:
    """Return one benchmark after a number of edits against the size, with what is published of the same cells."""
    asked = [one for one in mine if column in one.columns and rung in one.rungs]
    panel = size_panel(
        f"{short_name(column)} ({column.protocol}) after {rung}",
        column.metric.replace("_", " "),
        asked,
        {key_of(one): scores_of(one, column)[rung] for one in asked},
        sizes,
        colours,
    )
    rows = {key_of(one): row for one in asked for row in _published(one, column) if row.num_edits == rung}
    printed = size_panel(
        "", "", asked, {key: Interval(value=row.value, low=row.value, high=row.value) for key, row in rows.items()}, sizes, colours
    )
    curves = (*panel.curves, *(replace(curve, published=True) for curve in printed.curves))
    return replace(panel, curves=curves, levels=_chances(asked, column), notes=doubts_of(rows.values()))


def size_panel(
    title: str,
    unit: str,
    mine: Sequence[Series],
    values: Mapping[tuple[str, str, str], Interval],
    sizes: Mapping[str, float],
    colours: Mapping[str, int],
    *,
    quality: bool = False,
) -> Panel:
    """Return a number of each series against the size of its model: one curve a method and data set."""
    curves = []
    for method, dataset in dict.fromkeys((one.method, one.dataset) for one in mine):
        found = [
            (sizes[one.model], values[key_of(one)])
            for one in mine
            if (one.method, one.dataset) == (method, dataset) and key_of(one) in values
        ]
        points = finite([Point(size, value.value, value.low, value.high) for size, value in sorted(found, key=lambda pair: pair[0])])
        curves.append(Curve(label=method, model="", method=method, dataset=dataset, points=points, colour=colours[method]))
    return Panel(title=title, unit=unit, curves=drawn(curves), axis="size", quality=quality)


def norm_panel(mine: Sequence[Series], colours: Mapping[str, int]) -> Panel:
    """Return how large the edited weights are."""
    return _ratio_panel("norm of edited weights", lambda edit: edit.get("weight_norm_ratio"), mine, colours)


def canary_panel(mine: Sequence[Series], colours: Mapping[str, int]) -> Panel:
    """Return how surprising plain sentences are, at rungs."""
    return _ratio_panel("canary: perplexity of plain sentences", lambda edit: edit.get("canary_ratio"), mine, colours)


def _ratio_panel(title: str, read: OfEdit, mine: Sequence[Series], colours: Mapping[str, int]) -> Panel:
    """Return a panel of what the edit log has as a multiple of the unedited model's."""
    curves = [monitor_curve(one, {0: (1.0,), **ratios}, colours[one.method], log=True) for one in mine if (ratios := of_edits(one, read))]
    return Panel(title=title, unit="times unedited", curves=drawn(curves), share=False, log=True)


def update_norm(edit: Mapping[str, Any]) -> float | None:
    """Return the norm of an edit's update, where its method says it."""
    norm: float | None = edit.get("diagnostics", {}).get("update_norm")
    return norm


def of_edits(one: Series, read: OfEdit) -> dict[int, tuple[float, ...]]:
    """Return a number of the edit log of every run, at edits that all of them have and no more than can be seen."""
    logs = [{int(edit["num_edits"]): value for edit in run.edits if (value := read(edit)) is not None} for run in one.runs]
    shared = sorted(set.intersection(*map(set, logs)))
    step = max(1, len(shared) // MAX_MONITOR_POINTS)
    return {place: tuple(log[place] for log in logs) for place in dict.fromkeys((*shared[::step], *shared[-1:]))}


def _published(one: Series, column: Column) -> tuple[PublishedRow, ...]:
    """Return the printed rows of a series as far as it was measured."""
    rows = published_curve(one.model, one.runs[0].method, one.runs[0].dataset, column)
    return tuple(row for row in rows if row.num_edits <= max(one.rungs, default=0))


def _chances(mine: Iterable[Series], column: Column) -> tuple[tuple[str, float], ...]:
    """Return the lines of guessing on a benchmark."""
    found = dict.fromkeys(chance for one in mine if (chance := one.runs[0].table.chance(column)) is not None)
    return tuple(("chance", chance) for chance in found)


def key_of(one: Series) -> tuple[str, str, str]:
    """Return what tells a series from every other."""
    return one.model, one.method, one.dataset


def short_name(column: Column) -> str:
    """Return benchmark and task, no word twice and none that the protocol says anyway."""
    words = re.split(r"[\s_-]+", f"{column.benchmark} {column.task}")
    said = set(re.split(r"[\s_-]+", column.protocol))
    return " ".join(word for word in dict.fromkeys(words) if word not in said) or column.benchmark
