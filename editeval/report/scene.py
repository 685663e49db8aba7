"""A picture as a list of shapes, written as SVG (a page's own, or a file) and as PNG: one layout, equal in both.

Hundreds of small panels a page are too many for a plotting library: this draws one in about a millisecond.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

INK, MUTED, FAINT = "ink", "muted", "line"  # colours that a page defines (`var(--ink)`); in files they are these:
FILE_COLOURS = {INK: "#1f2328", MUTED: "#656d76", FAINT: "#d8dee4"}
PNG_SCALE = 2
FONT = "system-ui, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline."""

    points: tuple[Point, ...]
    colour: str
    width: float = 1.5
    dash: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Area:
    """A filled polygon; `strength` is its opacity on white."""

    points: tuple[Point, ...]
    colour: str
    strength: float = 0.15


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Round marks; `hollow` ones are rings."""

    points: tuple[Point, ...]
    colour: str
    radius: float = 2.6
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Text:
    """One line of text; `y` is its base line."""

    x: float
    y: float
    text: str
    size: float = 11
    anchor: Anchor = "start"
    colour: str = INK
    bold: bool = False


Shape = Line | Area | Dots | Text


@dataclass(frozen=True, kw_only=True)
class Group:
    """Shapes that are shown or hidden together; `data` are what a page filters by."""

    shapes: tuple[Shape, ...]
    title: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture, and what it shows in words."""

    width: float
    height: float
    groups: tuple[Group, ...]
    description: str


# -- SVG -------------------------------------------------------------------------------------------------------------------


def svg(scenes: Sequence[Scene], *, columns: int = 1, title: str = "", in_page: bool = False) -> str:
    """Return the scenes side by side as one `<svg>` element; in a page its colours are the page's."""
    width, height, places = _grid(scenes, columns, title)
    body = [] if not title else [_svg_shape(Text(x=8, y=20, text=title, size=14, bold=True), in_page=in_page)]
    for scene, (x, y) in zip(scenes, places, strict=True):
        inner = "".join(_svg_group(group, in_page=in_page) for group in scene.groups)
        body.append(inner if (x, y) == (0, 0) else f'<g transform="translate({x:g} {y:g})">{inner}</g>')
    words = html.escape(" ".join(scene.description for scene in scenes), quote=True)
    space = "" if in_page else ' xmlns="http://www.w3.org/2000/svg"'
    return f'<svg{space} viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{words}" font-family="{FONT}">{"".join(body)}</svg>'


def _grid(scenes: Sequence[Scene], columns: int, title: str) -> tuple[float, float, list[Point]]:
    """Return the width, the height and each scene's corner: rows of equal cells under the title."""
    across = min(columns, len(scenes))
    width, height = max(scene.width for scene in scenes), max(scene.height for scene in scenes)
    top = 30 if title else 0
    places = [((place % across) * width, top + (place // across) * height) for place in range(len(scenes))]
    return across * width, top + -(-len(scenes) // across) * height, places


def _svg_group(group: Group, *, in_page: bool) -> str:
    inner = "".join(_svg_shape(shape, in_page=in_page) for shape in group.shapes)
    if not group.data and not group.title:
        return inner
    data = "".join(f' data-{name}="{html.escape(value, quote=True)}"' for name, value in group.data.items()) if in_page else ""
    title = f"<title>{html.escape(group.title)}</title>" if group.title else ""
    return f'<g class="curve"{data}>{title}{inner}</g>'


def _svg_shape(shape: Shape, *, in_page: bool) -> str:
    colour = _colour(shape.colour, in_page=in_page)
    match shape:
        case Line():
            dash = "" if shape.dash is None else f' stroke-dasharray="{shape.dash[0]:g} {shape.dash[1]:g}"'
            return f'<path d="M{_path(shape.points)}" fill="none" stroke="{colour}" stroke-width="{shape.width:g}"{dash}/>'
        case Area():
            return f'<path d="M{_path(shape.points)}z" fill="{colour}" fill-opacity="{shape.strength:g}"/>'
        case Dots(hollow=True):
            rings = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{shape.radius:g}"/>' for x, y in shape.points)
            return f'<g fill="none" stroke="{colour}">{rings}</g>'
        case Dots():
            dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in shape.points)
            return f'<path d="{dots}" stroke="{colour}" stroke-width="{2 * shape.radius:g}" stroke-linecap="round"/>'
        case Text():
            anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            bold = ' font-weight="600"' if shape.bold else ""
            text = html.escape(shape.text)
            return f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" fill="{colour}"{anchor}{bold}>{text}</text>'


def _path(points: Sequence[Point]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _colour(colour: str, *, in_page: bool) -> str:
    return colour if colour not in FILE_COLOURS else f"var(--{colour})" if in_page else FILE_COLOURS[colour]


# -- PNG -------------------------------------------------------------------------------------------------------------------


def png(scenes: Sequence[Scene], *, columns: int = 1, title: str = "") -> bytes:
    """Return the scenes side by side as a PNG on white; equal scenes are equal bytes."""
    from PIL import Image, ImageDraw

    width, height, places = _grid(scenes, columns, title)
    image = Image.new("RGB", (round(width * PNG_SCALE), round(height * PNG_SCALE)), "white")
    draw = ImageDraw.Draw(image)
    if title:
        _png_shape(draw, Text(x=8, y=20, text=title, size=14, bold=True), (0, 0))
    for scene, corner in zip(scenes, places, strict=True):
        shapes = [shape for group in scene.groups for shape in group.shapes]
        for shape in sorted(shapes, key=lambda shape: not isinstance(shape, Area)):  # opaque here, so areas go below everything
            _png_shape(draw, shape, corner)
    buffer = io.BytesIO()
    image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def _png_shape(draw: ImageDraw, shape: Shape, corner: Point) -> None:
    """Draw one shape onto the image."""

    def at(point: Point) -> Point:
        return ((point[0] + corner[0]) * PNG_SCALE, (point[1] + corner[1]) * PNG_SCALE)

    colour = _colour(shape.colour, in_page=False)
    match shape:
        case Line():
            for part in [shape.points] if shape.dash is None else _dashes(shape.points, *shape.dash):
                draw.line([at(point) for point in part], fill=colour, width=max(1, round(shape.width * PNG_SCALE)), joint="curve")
        case Area():
            draw.polygon([at(point) for point in shape.points], fill=_on_white(colour, shape.strength))
        case Dots():
            radius = shape.radius * PNG_SCALE
            for x, y in map(at, shape.points):
                fill = None if shape.hollow else colour
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=colour, width=PNG_SCALE)
        case Text():
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            draw.text(at((shape.x, shape.y)), shape.text, fill=colour, font=_font(round(shape.size * PNG_SCALE), shape.bold), anchor=anchor)


def _dashes(points: Sequence[Point], on: float, off: float) -> list[tuple[Point, Point]]:
    """Cut a polyline into its dashes."""
    parts = []
    travelled = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        start = -(travelled % (on + off))
        while length and start < length:
            a, b = max(start, 0.0) / length, min(start + on, length) / length
            if b > a:
                parts.append(((x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))))
            start += on + off
        travelled += length
    return parts


def _on_white(colour: str, strength: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 - (255 - int(colour[place : place + 2], 16)) * strength) for place in (1, 3, 5))
    return red, green, blue


@functools.lru_cache(maxsize=32)
def _font(size: int, bold: bool) -> FreeTypeFont:
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf", size)
