"""Charts of a study as data: panels of curves over the number of edits (or another axis), and maps of cells. No drawing here."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from editeval.runner.table import format_number

Axis = Literal["edits", "size"]


class Point(NamedTuple):
    """A measured point with its interval: the point itself where none is known, infinite ends where it has no bounds.

    One that does not `count` is shown, but nothing may be read from it.
    """

    x: float
    y: float
    low: float
    high: float
    counts: bool = True

    @property
    def is_bounded(self) -> bool:
        """Whether the interval says where the truth is."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def told(self) -> str:
        """Return the value in words."""
        return format_number(self.y) + ("" if self.is_bounded else " (no bounds)") + ("" if self.counts else " (does not count)")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve. `seed` is None for all orders of edits together; `published` ones are not ours and drawn faintly."""

    label: str
    model: str
    method: str
    dataset: str
    points: tuple[Point, ...]
    seed: int | None = None
    colour: int = 0  # place in the palette
    dashed: bool = False
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes. `quality` marks edit quality, which stands beside ability in every chart."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    axis: Axis = "edits"
    levels: tuple[tuple[str, float], ...] = ()  # lines across, such as chance
    share: bool = True  # from 0 to 1
    log: bool = False
    quality: bool = False
    notes: tuple[str, ...] = ()  # sentences for the chart's caption

    def description(self) -> str:
        """Return the panel in words: every curve of all orders, point by point."""
        told = [
            f"{curve.label}{' (published)' if curve.published else ''}: "
            + ", ".join(f"{point.told()} at {point.x:g}" for point in curve.points)
            for curve in self.curves
            if curve.seed is None
        ]
        return f"{self.title}, {self.unit}, by {AXES[self.axis]}. {'; '.join(told)}."


@dataclass(frozen=True, kw_only=True)
class CellMap:
    """A map: `values[i][j]` from 0 to 1 is row i at column j; None where there is nothing."""

    title: str
    model: str
    method: str
    dataset: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    def description(self) -> str:
        """Return the map in words."""
        told = [
            f"{row}: "
            + ", ".join(
                f"{format_number(value)} after {column}" for column, value in zip(self.columns, values, strict=True) if value is not None
            )
            for row, values in zip(self.rows, self.values, strict=True)
        ]
        return f"{self.title}. {'; '.join(told)}."


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture of several panels: of a question, about one subject (a model, a family)."""

    name: str  # of its files
    question: str
    title: str
    panels: tuple[Panel | CellMap, ...]
    caption: str


AXES = {"edits": "number of edits", "size": "parameters"}


def chart_csv(chart: Chart) -> str:
    """Return a row a point, with what every picture of the chart shows and no more."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "curve", "model", "method", "dataset", "seed", "source", "x", "y", "low", "high", "counts"])
    for panel in chart.panels:
        if isinstance(panel, CellMap):
            head = (panel.title, panel.model, panel.method, panel.dataset)
            for row, values in zip(panel.rows, panel.values, strict=True):
                for column, value in zip(panel.columns, values, strict=True):
                    if value is not None:
                        writer.writerow([head[0], row, *head[1:], "all", "measured", column, repr(value), "", "", "yes"])
            continue
        for curve in panel.curves:
            seed, source = "all" if curve.seed is None else curve.seed, "published" if curve.published else "measured"
            for point in curve.points:
                ends = (_exact(point.low), _exact(point.high)) if point.is_bounded and point.low < point.high else ("", "")
                whose = (panel.title, curve.label, curve.model, curve.method, curve.dataset, seed, source)
                writer.writerow([*whose, f"{point.x:g}", _exact(point.y), *ends, "yes" if point.counts else "no"])
    return text.getvalue()


def without_seeds(panel: Panel | CellMap) -> Panel | CellMap:
    """Return the panel without the curves of single seeds, which only a page with filters shows."""
    if isinstance(panel, CellMap):
        return panel
    return replace(panel, curves=tuple(curve for curve in panel.curves if curve.seed is None))


def name_of(*parts: str) -> str:
    """Return the name of a figure's files: letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def finite(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that can be drawn."""
    return tuple(point for point in points if math.isfinite(point.y))


def _exact(value: float) -> str:
    return repr(float(value))
