"""From a chart's panels to scenes: axes, curves with intervals, labels at their ends, maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from editeval.report.charts import AXES, CellMap, Curve, Panel
from editeval.report.figures import COLOURS, FAILS, IN_PART, PASSES, spread
from editeval.report.scene import FAINT, INK, MUTED, Area, Dots, Group, Line, Point, Scene, Shape, Text

WIDTH, HEIGHT = 360.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 260.0, 28.0, 200.0  # edges of the axes; the curves' names are right of them
LABEL_GAP = 11.5
LABEL_CHARACTERS = 17
MAX_TICKS = 8
ROUND = (1, 2, 5)  # the digits of round numbers


def scene(panel: Panel | CellMap) -> Scene:
    """Draw a panel or a map."""
    return _map_scene(panel) if isinstance(panel, CellMap) else _panel_scene(panel)


def colour(place: int) -> str:
    """Return a colour of the palette; methods beyond it start again, with another dash."""
    return COLOURS[place % len(COLOURS)]


# -- curves ----------------------------------------------------------------------------------------------------------------


class _Scale:
    """Where a number is on the page: edits by log(1 + n), sizes by log, the rest as given or by log."""

    def __init__(self, low: float, high: float, start: float, end: float, kind: str) -> None:
        self.kind, self.start, self.end = kind, start, end
        self.low, self.high = self._turn(low), self._turn(high)

    def _turn(self, value: float) -> float:
        return math.log1p(value) if self.kind == "edits" else math.log(max(value, 1e-300)) if self.kind in ("size", "log") else value

    def __call__(self, value: float) -> float:
        share = (self._turn(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(max(share, -0.02), 1.02) * (self.end - self.start)


def _panel_scene(panel: Panel) -> Scene:
    xs = sorted({point.x for curve in panel.curves for point in curve.points})
    x_scale = _Scale(xs[0] if panel.axis == "size" else 0, max(xs[-1], 1e-9), LEFT, RIGHT, panel.axis)
    low, high = _y_range(panel)
    y_scale = _Scale(low, high, BOTTOM, TOP, "log" if panel.log else "plain")
    groups = [Group(shapes=tuple(_axes(panel, xs, x_scale, y_scale, low, high)))]
    drawn = [(curve, tuple((x_scale(point.x), y_scale(point.y)) for point in curve.points)) for curve in panel.curves if curve.points]
    together = sorted((item for item in drawn if item[0].seed is None and not item[0].published), key=lambda item: item[1][-1][1])
    heights = dict(zip((_whose(curve) for curve, _ in together), _spread([points[-1][1] for _, points in together]), strict=True))
    for curve, points in drawn:
        shapes = _curve(curve, points, x_scale, y_scale)
        if not curve.published and _whose(curve) in heights:  # of one seed: where the curve of all seeds has its name
            end = heights[_whose(curve)]
            shapes.append(Line(points=(points[-1], (RIGHT + 6, end - 3)), colour=colour(curve.colour), width=0.7))
            shapes.append(Text(x=RIGHT + 8, y=end, text=_cut(curve.label), size=9.5))
        data = {
            "model": curve.model,
            "method": curve.method,
            "dataset": curve.dataset,
            "seed": "all" if curve.seed is None else str(curve.seed),
        }
        groups.append(
            Group(shapes=tuple(shapes), title=_tell(curve), data=data if not curve.published else {**data, "source": "published"})
        )
    return Scene(width=WIDTH, height=HEIGHT, groups=tuple(groups), description=panel.description())


def _whose(curve: Curve) -> tuple[str, str, str]:
    return curve.label, curve.model, curve.dataset


def _curve(curve: Curve, points: tuple[Point, ...], x_scale: _Scale, y_scale: _Scale) -> list[Shape]:
    shade = colour(curve.colour)
    if curve.published:
        dotted = Line(points=points, colour=shade, width=1, dash=(5, 3) if curve.dashed else (1.5, 3))
        return [dotted, Dots(points=points, colour=shade, radius=2.2, hollow=True)]
    shapes: list[Shape] = []
    for has_band, neighbours in groupby(curve.points, key=lambda point: point.is_bounded and point.counts):
        part = list(neighbours)
        if not has_band or not any(point.low < point.high for point in part):
            continue
        upper = [(x_scale(point.x), y_scale(point.high)) for point in part]
        lower = [(x_scale(point.x), y_scale(point.low)) for point in reversed(part)]
        if len(part) > 1:
            shapes.append(Area(points=tuple(upper + lower), colour=shade, strength=0.13 if curve.seed is None else 0.05))
        else:
            shapes.append(Line(points=(*lower, *upper), colour=shade, width=1))
    dash = (5.0, 3.0) if curve.dashed else None if curve.colour < len(COLOURS) else (2.0, 2.0)
    shapes.append(Line(points=points, colour=shade, width=1.7 if curve.seed is None else 1.0, dash=dash))
    for full in (True, False):
        marked = tuple(place for place, point in zip(points, curve.points, strict=True) if (point.is_bounded and point.counts) == full)
        if marked:
            shapes.append(Dots(points=marked, colour=shade, radius=2.6 if curve.seed is None else 1.8, hollow=not full))
    return shapes


def _axes(panel: Panel, xs: Sequence[float], x_scale: _Scale, y_scale: _Scale, low: float, high: float) -> list[Shape]:
    shapes: list[Shape] = [Text(x=4, y=14, text=panel.title, size=11.5, bold=True)]
    for value in _ticks(low, high, log=panel.log):
        y = y_scale(value)
        shapes.append(Line(points=((LEFT, y), (RIGHT, y)), colour=FAINT, width=0.7))
        shapes.append(Text(x=LEFT - 4, y=y + 3.5, text=f"{value:g}", size=9.5, anchor="end", colour=MUTED))
    for name, value in panel.levels:
        if low <= value <= high:
            y = y_scale(value)
            shapes.append(Line(points=((LEFT, y), (RIGHT, y)), colour=MUTED, width=1, dash=(1.5, 2.5)))
            shapes.append(Text(x=LEFT + 3, y=y - 3, text=f"{name} {value:.3g}".strip(), size=8.5, colour=MUTED))
    last = -math.inf
    for value in _places(xs):
        x = x_scale(value)
        if x - last >= 20:
            shapes.append(Line(points=((x, BOTTOM), (x, BOTTOM + 4)), colour=MUTED, width=0.8))
            shapes.append(
                Text(
                    x=x,
                    y=BOTTOM + 15,
                    text=size_text(value) if panel.axis == "size" else f"{value:g}",
                    size=9.5,
                    anchor="middle",
                    colour=MUTED,
                )
            )
            last = x
    shapes.append(Line(points=((LEFT, BOTTOM), (RIGHT, BOTTOM)), colour=MUTED, width=0.8))
    shapes.append(
        Text(x=(LEFT + RIGHT) / 2, y=BOTTOM + 30, text=f"{AXES[panel.axis]} (y: {panel.unit})", size=9.5, anchor="middle", colour=INK)
    )
    return shapes


def _y_range(panel: Panel) -> tuple[float, float]:
    if panel.share:
        return 0.0, max(1.0, min(1.3, max((point.y for curve in panel.curves for point in curve.points), default=1.0)))
    # Bands may leave the axes: where two orders differ much, theirs would leave no room for the curves.
    values = [point.y for curve in panel.curves for point in curve.points if point.y > 0 or not panel.log]
    low, high = min(values, default=0.1), max(values, default=1.0)
    if panel.log:
        return low / 1.15, max(high, low * 1.5) * 1.15
    room = 0.08 * (high - low) or 0.1 * max(1.0, abs(high))
    return low - room, high + room


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        for digits in ((1,), ROUND):
            if len(found := _round_numbers(low, high, digits)) > 1:
                return found[:: max(1, len(found) // 4)]
        return [float(f"{low * 1.15:.2g}"), float(f"{high / 1.15:.2g}")]
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * factor for factor in (0.2, 0.25, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 6)
    return [round(step * place, 10) for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _places(xs: Sequence[float]) -> Sequence[float]:
    """Return where an axis has its numbers: all of them where they are few, else round ones between the first and the last."""
    if len(xs) <= MAX_TICKS:
        return xs
    between = [value for value in _round_numbers(max(xs[0], 1), xs[-1], ROUND) if xs[0] < value < xs[-1]]
    return [xs[0], *between, xs[-1]]


def _round_numbers(low: float, high: float, digits: Sequence[int]) -> list[float]:
    """Return the numbers from `low` to `high` of one digit and zeros, whose digit is one of these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for digit in digits if low <= (value := digit * 10.0**power) <= high]


def _spread(wanted: Sequence[float]) -> list[float]:
    """Return label heights for ascending ones, apart from one another and beside the axes, as near as may be to what is wanted."""
    gap = min(LABEL_GAP, (BOTTOM - TOP) / max(1, len(wanted) - 1))
    heights = spread([y + 3 for y in wanted], gap=gap)
    lowest = BOTTOM + 3
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], lowest)
        lowest = heights[number] - gap
    highest = TOP + 3
    for number in range(len(heights)):
        heights[number] = max(heights[number], highest)
        highest = heights[number] + gap
    return heights


def size_text(value: float) -> str:
    """Return a number of parameters as models are named by it."""
    return f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_CHARACTERS else f"{text[: LABEL_CHARACTERS - 1]}…"


def _tell(curve: Curve) -> str:
    whose = "published" if curve.published else f"{curve.model}, {curve.dataset}" + ("" if curve.seed is None else f", seed {curve.seed}")
    return f"{curve.label} ({whose}): " + ", ".join(f"{point.x:g}: {point.told()}" for point in curve.points[:12])


# -- maps ------------------------------------------------------------------------------------------------------------------


def _map_scene(cells: CellMap) -> Scene:
    left, top = 92.0, 28.0
    width, height = (WIDTH - left - 8) / max(1, len(cells.columns)), (BOTTOM - top) / max(1, len(cells.rows))
    shapes: list[Shape] = [Text(x=4, y=14, text=cells.title, size=11.5, bold=True)]
    for i, (row, values) in enumerate(zip(cells.rows, cells.values, strict=True)):
        y = top + i * height
        shapes.append(Text(x=left - 5, y=y + height / 2 + 3.5, text=row, size=9.5, anchor="end", colour=MUTED))
        for j, value in enumerate(values):
            if value is not None:
                x = left + j * width
                corners = ((x, y), (x + width - 1, y), (x + width - 1, y + height - 1), (x, y + height - 1))
                shapes.append(Area(points=corners, colour=_mix(value), strength=1))
                if width >= 24 and height >= 12:
                    ink = "#ffffff" if value > 0.75 else "#1f2328"
                    shapes.append(Text(x=x + width / 2, y=y + height / 2 + 3.5, text=f"{value:.2f}", size=9, anchor="middle", colour=ink))
    for j, column in enumerate(cells.columns):
        shapes.append(Text(x=left + (j + 0.5) * width, y=BOTTOM + 14, text=column, size=9.5, anchor="middle", colour=MUTED))
    shapes.append(Text(x=left + (WIDTH - left) / 2, y=BOTTOM + 30, text="after so many edits", size=9.5, anchor="middle"))
    data = {"model": cells.model, "method": cells.method, "dataset": cells.dataset, "seed": "all"}
    return Scene(width=WIDTH, height=HEIGHT, groups=(Group(shapes=tuple(shapes), data=data),), description=cells.description())


def _mix(value: float) -> str:
    """Return the colour of a share: fails, in part, passes."""
    start, end, share = (FAILS, IN_PART, 2 * value) if value < 0.5 else (IN_PART, PASSES, 2 * value - 1)
    parts = [round(int(start[at : at + 2], 16) * (1 - share) + int(end[at : at + 2], 16) * share) for at in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)
