"""Figures with matplotlib: curves over the number of edits, and the retention matrix.

Every figure is a `Figure` of its own (no pyplot, no global state). Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/),
which people with any kind of colour vision tell apart; markers say the same again, and every curve is labelled at its end.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from editeval.report.intervals import score_interval
from editeval.report.panels import Panel
from editeval.runner.retention import Retention
from editeval.runner.table import Column

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FAILS, IN_PART, PASSES = "#D55E00", "#F3DFA2", "#0072B2"  # of what an edit should do, from 0 to 1
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANEL_INCHES = (5.4, 3.5)
NARROW_INCHES = (4.2, 3.0)  # for a page: fills a phone's width with text that is still readable
PNG_DPI = 150
LABEL_GAP = 0.085  # smallest distance of two labels at the curves' ends, as a share of the axes' height
DODGE_POINTS = 2.5
MANY_TICKS = 9
LOG_FROM = 30  # ratio of largest to smallest number from which an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of what is not data."""

    ink: str
    muted: str
    paper: str


LIGHT = Theme(ink="#1f2328", muted="#7d8590", paper="#ffffff")
# Colours that stand for the page's own: `svg` puts CSS variables in their place, so that one picture serves light and dark.
PAGE = Theme(ink="#010203", muted="#040506", paper="none")


# -- curves ----------------------------------------------------------------------------------------------------------------


def curves_figure(
    panels: Sequence[Panel],
    *,
    theme: Theme = LIGHT,
    columns: int = 2,
    inches: tuple[float, float] = PANEL_INCHES,
    title: str | None = None,
) -> Figure:
    """Return one figure with a set of axes a panel, each of a size in inches."""
    across = min(columns, len(panels))
    down = math.ceil(len(panels) / across)
    with _style(theme):
        figure = Figure(figsize=(inches[0] * across, inches[1] * down + (0.4 if title else 0)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(down, across, squeeze=False).flat
        for axis, panel in zip(axes, panels, strict=False):
            draw_curves(axis, panel, theme=theme)
        for axis in list(figure.axes)[len(panels) :]:
            axis.remove()
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold", color=theme.ink)
    return figure


def draw_curves(axis: Axes, panel: Panel, *, theme: Theme) -> None:
    """Draw a panel: measured points with 95% intervals, each curve's unedited level, and chance."""
    rungs = panel.table.rungs
    axis.set_xscale("symlog", linthresh=1, linscale=0.5)  # zero edits have a place, and thousands too
    axis.set_xlim(-0.25, max(rungs[-1], 1) * 1.12)
    _tick(axis, rungs)
    axis.set_xlabel("number of edits")
    axis.set_ylabel(panel.unit)
    axis.set_title(panel.title, loc="left")
    low, high, scale = (-0.04, 1.04, "linear") if panel.is_share else _y_range(panel)
    axis.set_yscale(scale)
    axis.set_ylim(low, high)
    ends = [end for place, column in enumerate(panel.columns) if (end := _draw_curve(axis, panel, column, place)) is not None]
    for chance in sorted({level for column in panel.columns if (level := panel.table.chance(column)) is not None}):
        axis.axhline(chance, color=theme.muted, linestyle=(0, (1, 2)), linewidth=1.2)
        ends.append(_End(label=f"chance {chance:.3g}", colour=theme.muted, x=axis.get_xlim()[1], y=chance))
    _label_ends(axis, ends, theme)


@dataclass(frozen=True, kw_only=True)
class _End:
    """Where a curve ends, and what it is called."""

    label: str
    colour: str
    x: float
    y: float


def _draw_curve(axis: Axes, panel: Panel, column: Column, place: int) -> _End | None:
    table = panel.table
    scores = [table.cells[(rung, column)] for rung in table.rungs if (rung, column) in table.cells]
    points = [score for score in scores if math.isfinite(score.value)]
    if not points:
        return None
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    x, y = [score.num_edits for score in points], [score.value for score in points]
    intervals = [score_interval(score, is_share=panel.is_share) for score in points]
    margins = [[one.value - one.low for one in intervals], [one.high - one.value for one in intervals]]
    # Beside one another by a few points of the page, so that equal numbers do not hide each other.
    aside = ScaledTranslation((place - (len(panel.columns) - 1) / 2) * DODGE_POINTS / 72, 0, axis.figure.dpi_scale_trans)
    if any(map(any, margins)):
        axis.errorbar(x, y, yerr=margins, fmt="none", ecolor=colour, elinewidth=1, alpha=0.45, transform=axis.transData + aside)
    axis.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.8, transform=axis.transData + aside)
    if x[0] == 0 and len(x) > 1:
        axis.axhline(y[0], color=colour, linewidth=0.9, linestyle=(0, (6, 3)), alpha=0.55)
    label = panel.label(column) + ("*" if table.at_chance(column) else "")
    return _End(label=label, colour=colour, x=x[-1], y=y[-1])


def _label_ends(axis: Axes, ends: Sequence[_End], theme: Theme) -> None:
    """Write each curve's name right of the axes, moved apart where curves end close together, with a line to its point."""
    to_axes = axis.transData + axis.transAxes.inverted()
    placed = sorted(((float(to_axes.transform((end.x, end.y))[1]), end) for end in ends), key=lambda pair: pair[0])
    heights = spread([height for height, _ in placed], gap=LABEL_GAP)
    for height, (_, end) in zip(heights, placed, strict=True):
        axis.annotate(
            end.label,
            xy=(end.x, end.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=theme.ink,
            arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 1.2, "shrinkA": 1, "shrinkB": 3},
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Return ascending positions at least `gap` apart, as near as possible to the wanted ascending ones (least squares).

    Pool-adjacent-violators on `wanted[i] - i * gap` (Ayer et al. 1955).
    """
    blocks: list[tuple[float, int]] = []
    for index, value in enumerate(wanted):
        mean, count = value - index * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    level = [mean for mean, count in blocks for _ in range(count)]
    return [value + index * gap for index, value in enumerate(level)]


def _y_range(panel: Panel) -> tuple[float, float, str]:
    """Return lower end, upper end and scale of an axis that shows every finite number of a panel."""
    values = [value for rung in panel.table.rungs for column in panel.columns if (value := panel.table.value(rung, column)) is not None]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if low > 0 and high / low > LOG_FROM:
        room = (high / low) ** 0.1
        return low / room, high * room, "log"
    room = 0.1 * (high - low) or max(1.0, abs(high)) * 0.1
    return low - room, high + room, "linear"


def _tick(axis: Axes, rungs: Sequence[int]) -> None:
    shown = list(rungs)
    while len(shown) > MANY_TICKS:  # keep both ends and thin out the middle
        shown = [shown[0], *shown[2:-1:2], shown[-1]]
    axis.set_xticks(shown, [str(rung) for rung in shown])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())


# -- retention -------------------------------------------------------------------------------------------------------------


def retention_figure(matrix: Retention, *, theme: Theme = LIGHT) -> Figure:
    """Return the heat map: a row a fact in editing order, a column a rung; blank where a fact was not asked."""
    with _style(theme):
        height = min(9.0, 1.5 + 0.17 * max(len(matrix.positions), 4))
        figure = Figure(figsize=(NARROW_INCHES[0], height), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        values = np.array([[math.nan if value is None else value for value in row] for row in matrix.values], dtype=float)
        colours = LinearSegmentedColormap.from_list("retention", [FAILS, IN_PART, PASSES])
        image = axis.imshow(values, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap=colours)
        axis.set_xticks(range(len(matrix.rungs)), [str(rung) for rung in matrix.rungs])
        step = max(1, math.ceil(len(matrix.positions) / 20))
        places = range(0, len(matrix.positions), step)
        axis.set_yticks(places, [str(matrix.positions[place]) for place in places])
        axis.set_xlabel("after so many edits")
        axis.set_ylabel("fact, in editing order")
        axis.set_title(f"{matrix.metric} ({matrix.protocol})".replace("_", " "), loc="left")
        _draw_frontier(axis, matrix, theme)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["fails", "in part", "passes"])
        bar.outline.set_visible(False)
    return figure


def _draw_frontier(axis: Axes, matrix: Retention, theme: Theme) -> None:
    """Draw the line between facts already edited (above) and still to come."""
    edges = [sum(position <= rung for position in matrix.positions) - 0.5 for rung in matrix.rungs]
    x = [place + side for place in range(len(edges)) for side in (-0.5, 0.5)]
    axis.plot(x, [edge for edge in edges for _ in range(2)], color=theme.ink, linewidth=1.6)
    axis.set_xlim(-0.5, len(matrix.rungs) - 0.5)
    axis.set_ylim(len(matrix.positions) - 0.5, -0.5)


# -- files -----------------------------------------------------------------------------------------------------------------


def png(figure: Figure) -> bytes:
    """Return the figure as PNG; equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, *, salt: str) -> str:
    """Return the figure as an `<svg>` element for a page that defines the CSS variables `--ink` and `--muted`.

    `salt` must differ between the figures of a page: their ids are made from it, and from nothing random.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*pt" height="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # group names such as axes_1 repeat in every figure, and nothing refers to them
    return text.replace(PAGE.ink, "var(--ink)").replace(PAGE.muted, "var(--muted)").strip()


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    with mpl.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": theme.muted,
            "axes.labelcolor": theme.ink,
            "axes.titlecolor": theme.ink,
            "axes.facecolor": "none",
            "text.color": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
            "figure.facecolor": theme.paper,
        }
    ):
        yield
