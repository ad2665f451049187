"""Charts as inline SVG: axes, lines, dots with whiskers, grids of cells. Nothing to load.

Colours are classes, so that the page's style decides them for light and dark; every series also has
a mark of its own shape, so that colour is never the only difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 430, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 46
COLOURS = 8
_CELL = 16
_MARKS = ("circle", "square", "diamond", "triangle", "cross", "ring")


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of numbers, its ticks, and what they are."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()
    """Where to put some; empty: at round numbers."""

    def share(self, value: float) -> float:
        """Where a number stands, 0 at the low end to 1; what lies outside stands at an end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def marks(self) -> list[tuple[float, str]]:
        """(number, what stands beside it)."""
        if self.ticks:
            return [(each, _in_words(each)) for each in self.ticks]
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, -(-(last - first) // 6))
            return [(10.0**each, _power(each)) for each in range(first, last + 1, step)]
        apart = _round_step((self.high - self.low) / 5)
        start, end = math.ceil(self.low / apart - 1e-9), math.floor(self.high / apart + 1e-9)
        return [(apart * each, _in_words(apart * each)) for each in range(start, end + 1)]


@dataclass(frozen=True, slots=True)
class Series:
    """One format's numbers."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int
    """Which colour and mark."""
    joined: bool = True
    marked: bool = True
    whiskers: Sequence[tuple[float, float]] = ()
    """Of each point: how far up a thick and a thin line go from it."""
    named: bool = False
    """Whether the name stands beside the first point."""
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """Series over two axes."""

    title: str
    """For who cannot see it: what is drawn, in a sentence."""
    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines, by what they are called."""

    def svg(self) -> Markup:
        """The picture."""
        parts = [_frame(self)]
        for name, at in self.levels.items():
            y = _down(self.y, at)
            parts.append(
                f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
                f'<text class="small" x="{WIDTH - _RIGHT}" y="{y - 4:.1f}" '
                f'text-anchor="end">{escape(name)}</text>'
            )
        # Marks over names, whose edge would hide them.
        parts += [_names(self), *(_draw(each, self) for each in self.series)]
        return Markup(
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(parts)}</svg>"
        )


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """Names beside the marks of their numbers."""
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{_mark(7, 7, number, "")}</svg>'
        f"{escape(name)}</li>"
        for name, number in names
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def cells(
    half: str, rows: Mapping[str, Sequence[float]], layers: Sequence[int], steps: Sequence[float]
) -> Markup:
    """A grid, layers across and heads down; a cell's class says between which steps it lies.

    Cells stand layer by layer and say nothing else: a large model has thousands of them.
    """
    heads = max((len(row) for row in rows.values()), default=0)
    left, top, below = _CELL * 2, 4, 4 + _CELL * heads
    width, height = left + _CELL * len(layers) + 4, below + 30
    made = []
    for column, layer in enumerate(layers):
        row = rows.get(str(layer), [None] * heads)
        for head, value in enumerate(row):
            made.append(
                f'<rect class="cell q{step_of(value, steps)}" x="{left + _CELL * column}" '
                f'y="{top + _CELL * head}"/>'
            )
    for column in range(0, len(layers), max(1, -(-len(layers) // 10))):
        made.append(
            f'<text class="small" x="{left + _CELL * column + 7.5}" y="{below + 13}" '
            f'text-anchor="middle">{layers[column]}</text>'
        )
    for head in range(0, heads, max(1, -(-heads // 8))):
        made.append(
            f'<text class="small" x="{left - 6}" y="{top + _CELL * head + 11}" '
            f'text-anchor="end">{head}</text>'
        )
    made.append(
        f'<text class="small" x="{left + _CELL * len(layers) / 2}" y="{height - 3}" '
        f'text-anchor="middle">layer</text>'
        f'<text class="small" transform="translate(9 {(top + below) / 2}) rotate(-90)" '
        f'text-anchor="middle">head</text>'
    )
    return Markup(
        f'<svg class="grid" style="width:{width}px" viewBox="0 0 {width} {height}" role="grid" '
        f'data-half="{half}" data-heads="{heads}" data-layers="{" ".join(map(str, layers))}" '
        f'aria-label="Error of attention\'s output by the {half}, layers across, kv_heads down">'
        f"{''.join(made)}</svg>"
    )


def step_of(value: float | None, steps: Sequence[float]) -> int:
    """0 for none, else 1 and one more for each step that it reaches."""
    return 0 if value is None else 1 + sum(value >= each for each in steps)


def _frame(plot: Plot) -> str:
    """Grid lines, ticks and labels."""
    made = []
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for value, words in plot.y.marks():
        y = _down(plot.y, value)
        made.append(
            f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
        )
    for value, words in plot.x.marks():
        x = _across(plot.x, value)
        made.append(
            f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{words}</text>'
        )
    made.append(
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="label" x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(plot.x.label)}</text>'
        f'<text class="label" transform="translate(12 {(_TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(plot.y.label)}</text>'
    )
    return "".join(made)


def _draw(series: Series, plot: Plot) -> str:
    places = [(_across(plot.x, x), _down(plot.y, y)) for x, y in series.points]
    colour = f"s{series.number % COLOURS}"
    made = []
    for (x, y), ends in zip(places, series.whiskers, strict=False):
        for kind, end in zip(("thick", "thin"), ends, strict=True):
            made.append(
                f'<line class="{kind} {colour}" x1="{x}" x2="{x}" y1="{y}" '
                f'y2="{_down(plot.y, end)}"/>'
            )
    if series.joined and len(places) > 1:
        points = " ".join(f"{x},{y}" for x, y in places)
        dashed = " dashed" if series.dashed else ""
        made.append(f'<polyline class="line {colour}{dashed}" points="{points}"/>')
    if series.marked:
        for (x, y), (at, value) in zip(places, series.points, strict=True):
            words = f"{series.name}: {_in_words(at)}, {value:.3g}"
            made.append(_mark(x, y, series.number, words, series.hollow))
    return "".join(made)


def _names(plot: Plot) -> str:
    """Names beside first points, pushed apart where they would lie on each other."""
    placed: list[tuple[float, float, str]] = []
    wanted = [
        (_across(plot.x, each.points[0][0]), _down(plot.y, each.points[0][1]), each.name)
        for each in plot.series
        if each.named and each.points
    ]
    for x, y, name in sorted(wanted, key=lambda each: each[1]):
        for other_x, other_y, _ in placed:
            if abs(x - other_x) < 80 and y - other_y < 13:
                y = other_y + 13
        placed.append((x, y, name))
    made = []
    for x, y, name in placed:
        # Before its mark at the right edge, and where another mark stands in the way.
        width = 12 + 8 * len(name)
        taken = any(4 < other - x < width and abs(at - y) < 10 for other, at, _ in wanted)
        left = taken or x + width > WIDTH
        at, anchor = (x - 9, "end") if left else (x + 9, "start")
        made.append(
            f'<text class="name" x="{at:.1f}" y="{y + 4:.1f}" '
            f'text-anchor="{anchor}">{escape(name)}</text>'
        )
    return "".join(made)


def _mark(x: float, y: float, number: int, words: str, hollow: bool = False) -> str:
    shape = _MARKS[number % len(_MARKS)]
    kind = " ring" if hollow or shape == "ring" else ""
    colour = f"mark s{number % COLOURS}{kind}"
    title = f"<title>{escape(words)}</title>" if words else ""
    if shape in ("circle", "ring"):
        return f'<circle class="{colour}" cx="{x}" cy="{y}" r="4.5">{title}</circle>'
    paths = {
        "square": "M-4-4h8v8h-8z",
        "diamond": "M0-6L6 0L0 6L-6 0z",
        "triangle": "M0-5.5L5.5 4.5H-5.5z",
        "cross": "M-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",
    }
    return (
        f'<path class="{colour}" transform="translate({x} {y})" d="{paths[shape]}">{title}</path>'
    )


def _across(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT), 1)


def _down(axis: Axis, value: float) -> float:
    return round(HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM), 1)


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(each * size for each in (1, 2, 5, 10) if each * size >= rough * 0.999)


def _in_words(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _power(exponent: int) -> str:
    if -3 < exponent < 4:
        return _in_words(10.0**exponent)
    raised = str(exponent).replace("-", "\N{MINUS SIGN}")
    return f'10<tspan dy="-4" font-size="9">{raised}</tspan>'
