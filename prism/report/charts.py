"""Charts as inline SVG, and tables. Colours and dashes come from the page's style sheet, for screen, dark and print.

A chart is 360 units wide, so that on a phone a unit is about a pixel and its text as large as the page's notes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 38
# longer lines are drawn as means of neighbouring points: a chart has no more pixels
_MOST_POINTS = 360
MISSING = '<span class="missing">not measured</span>'
# least ratio of greatest to least value for a logarithmic axis, which needs room for its ticks
_LOG_FROM = 8
# lines of this many points or more are drawn with their moving mean
_SMOOTHED = 20

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A line: points in order, None where no finite value was measured; errors are drawn as bars."""

    label: str
    points: Sequence[Point]
    errors: Sequence[float | None] = ()


@dataclass(frozen=True)
class Axis:
    """A range of values, mapped to 0..1.

    Args:
        low: least value.
        high: greatest value.
        log: whether the mapping is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Returns the position of a value in 0..1."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Round values, at most seven; on a logarithmic axis 1, 2 and 5 of each decade, or fewer."""
        if not self.log:
            rough = (self.high - self.low) / 4.5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [f * 10.0**d for d in decades for f in factors if self.low <= f * 10.0**d <= self.high]
            if len(ticks) <= 7:
                break
        return ticks


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    reference: tuple[float, str] | None = None,
    marks: Sequence[tuple[int, str]] = (),
) -> str:
    """Returns a chart of lines over the steps.

    Args:
        series: the lines.
        title: text for readers who cannot see the chart.
        low: least value of the axis; None fits the data.
        high: greatest value of the axis; None fits the data.
        log: whether the axis is logarithmic if all values are positive and far apart.
        reference: a level to draw, and its label.
        marks: steps with a problem, and the problem.
    """
    values = [value for one in series for _, value in one.points if value is not None]
    if reference:
        values.append(reference[0])
    y = _range(values, low, high, log and all(value > 0 for value in values))
    steps = [x for one in series for x, _ in one.points] + [float(step) for step, _ in marks]
    x = Axis(min(steps), max(max(steps), min(steps) + 1))
    across, up = _across(x), _up(y)
    parts = [_frame(y), _steps(x)]
    if reference:
        level = up(reference[0])
        parts.append(f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        above = level - 4 if level > TOP + 14 else level + 12
        parts.append(f'<text class="note" x="{WIDTH - RIGHT - 2}" y="{above:.1f}" text-anchor="end">')
        parts.append(f"{escape(reference[1])}</text>")
    for index, one in enumerate(series):
        points = _binned(one.points)
        smooth = _smoothed(points) if _half_window(len(points)) else None
        parts.append(_path(points, across, up, f"line c{index % 5}" + (" thin" if smooth else "")))
        if smooth:
            parts.append(_path(smooth, across, up, f"line c{index % 5} d{index % 5}"))
    for step, problem in marks:
        at, base = across(step), HEIGHT - BOTTOM
        parts.append(
            f'<path class="bad" d="M{at:.1f} {base - 9}l5 9h-10z"><title>step {step}: {escape(problem)}</title></path>'
        )
    return _svg("".join(parts), title)


def dot_chart(categories: Sequence[str], series: Sequence[Series], *, title: str, high: float | None = None) -> str:
    """Returns a chart of points with standard errors over categories, joined by lines.

    Args:
        categories: the categories in order; the x of a point is the index of its category.
        series: the values.
        title: text for readers who cannot see the chart.
        high: greatest value of the axis; None fits the data.
    """
    y = _range([value for one in series for _, value in one.points if value is not None], 0.0, high, False)
    across, up = _across(Axis(-0.5, len(categories) - 0.5)), _up(y)
    parts = [_frame(y)]
    for index, name in enumerate(categories):
        parts.append(
            f'<text x="{across(index):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(name)}</text>'
        )
    for index, one in enumerate(series):
        # side by side, so that their bars do not hide each other
        shift = (index - (len(series) - 1) / 2) * 0.11
        points = [(x + shift, value) for x, value in one.points]
        parts.append(_path(points, across, up, f"line c{index % 5} d{index % 5} thin"))
        for i, (x, value) in enumerate(points):
            if value is None:
                continue
            error = one.errors[i] if i < len(one.errors) else None
            if error:
                top, bottom = (up(min(max(value + sign * error, y.low), y.high)) for sign in (1, -1))
                parts.append(f'<path class="line c{index % 5}" d="M{across(x):.1f} {top:.1f}V{bottom:.1f}"/>')
            tip = f"{one.label} {categories[round(x - shift)]}: {value:.3f}"
            parts.append(_marker(index, across(x), up(value), tip))
    return _svg("".join(parts), title)


def column_chart(categories: Sequence[str], series: Sequence[Series], *, title: str, below: str) -> str:
    """Returns a chart of columns over categories, those of one category side by side.

    Args:
        categories: the categories in order; the x of a point is the index of its category.
        series: the values.
        title: text for readers who cannot see the chart.
        below: name of the categories.
    """
    y = _range([value for one in series for _, value in one.points if value is not None], 0.0, None, False)
    across, up = _across(Axis(-0.5, len(categories) - 0.5)), _up(y)
    width = 0.8 / len(series)
    parts = [_frame(y)]
    for index, name in enumerate(categories):
        parts.append(
            f'<text x="{across(index):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{escape(name)}</text>'
        )
    parts.append(f'<text class="note" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(below)}</text>')
    for index, one in enumerate(series):
        for x, value in one.points:
            if not value:
                continue
            begin, end = (across(x - 0.4 + width * (index + more)) for more in (0, 0.92))
            tip = f"{one.label}, {categories[round(x)]}: {value:.3f}"
            parts.append(
                f'<rect class="fill c{index % 5}" x="{begin:.1f}" width="{end - begin:.1f}" y="{up(value):.1f}" '
                f'height="{up(0) - up(value):.1f}"><title>{escape(tip)}</title></rect>'
            )
    return _svg("".join(parts), title)


def legend(labels: Sequence[str], shape: str = "line") -> str:
    """Returns the legend of a chart of `line`, `dot` or `column` shapes."""
    parts = []
    for index, label in enumerate(labels):
        drawn = f'<line class="line c{index % 5} d{index % 5}" x1="1" x2="27" y1="6" y2="6"/>'
        if shape == "dot":
            drawn = _marker(index, 14, 6, label)
        elif shape == "column":
            drawn = f'<rect class="fill c{index % 5}" x="8" y="0" width="12" height="12"/>'
        parts.append(
            f'<span class="key"><svg viewBox="0 0 28 12" aria-hidden="true">{drawn}</svg>{escape(label)}</span>'
        )
    return f'<p class="legend">{"".join(parts)}</p>'


def bar(share: float) -> str:
    """Returns a share as a bar that fits into a line of text."""
    filled = f'<rect class="fill c0" width="{100 * share:.1f}" height="10"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{filled}</svg>'


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "texts") -> str:
    """Returns a table of `texts` or `numbers`; cells are HTML, and the first of a line is its head."""
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join(f"<tr><th>{line[0]}</th>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>" for line in lines)
    return f'<div class="wide {kind}"><table><tr>{head}</tr>{body}</table></div>'


def figure(title: str, meaning: str, drawn: str, below: str) -> str:
    """Returns a chart with its title and meaning above it and its legend below it."""
    caption = f"<strong>{escape(title)}</strong> <span>{escape(meaning)}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{drawn}{below}</figure>"


def smoothing_note(steps: int) -> str:
    """Returns a note on the smoothing of lines over this many steps; empty if they are not smoothed."""
    size = _neighbours(steps)
    half = _half_window(math.ceil(steps / size))
    if not half:
        return ""
    thin = "single steps" if size == 1 else f"means of {size} steps"
    return f"Thin lines: {thin}; thick lines: means over {(2 * half + 1) * size} neighbouring steps."


def _neighbours(points: int) -> int:
    return math.ceil(points / _MOST_POINTS)


def _half_window(points: int) -> int:
    return 0 if points < _SMOOTHED else max(1, points // 24)


def _range(values: Sequence[float], low: float | None, high: float | None, log: bool) -> Axis:
    bottom = min(values, default=0.0) if low is None else low
    top = max(values, default=1.0) if high is None else high
    if log and top > _LOG_FROM * bottom:
        return Axis(bottom / 1.1, top * 1.1, log=True)
    # values that hardly differ are drawn as a level line, with short ticks
    pad = max(0.06 * (top - bottom), 0.01 * max(abs(top), abs(bottom)))
    if top - bottom + pad == 0:
        pad = 1.0
    return Axis(bottom - (0 if low is not None else pad), top + (0 if high is not None else pad))


def _across(axis: Axis) -> Callable[[float], float]:
    return lambda value: LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _up(axis: Axis) -> Callable[[float], float]:
    # values beyond a fixed range are drawn at its edge
    return lambda value: TOP + (1 - min(max(axis.at(max(value, axis.low)), 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)


def _frame(axis: Axis) -> str:
    up = _up(axis)
    parts = []
    for tick in axis.ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    base = HEIGHT - BOTTOM
    return "".join(parts) + f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'


def _steps(axis: Axis) -> str:
    across = _across(axis)
    ticks = [axis.low, *(tick for tick in axis.ticks if tick == int(tick))]
    # the first step, and round steps that do not overlap it
    room = 0.09 * (axis.high - axis.low)
    ticks = ticks[:1] + [tick for tick in ticks[1:] if tick - axis.low > room]
    parts = [
        f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:.0f}</text>'
        for tick in ticks
    ]
    return "".join(parts) + f'<text class="note" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>'


def _path(points: Sequence[Point], across: Callable[[float], float], up: Callable[[float], float], kind: str) -> str:
    parts, pen = [], False
    for x, value in points:
        if value is not None:
            # a line of no length shows a point between two gaps as a dot
            parts.append(f"{'L' if pen else 'M'}{across(x):.1f} {up(value):.1f}{'' if pen else 'h0'}")
        pen = value is not None
    return f'<path class="{kind}" d="{"".join(parts)}"/>' if parts else ""


def _marker(index: int, x: float, y: float, tip: str) -> str:
    shapes = (
        f'<circle class="fill c0" cx="{x:.1f}" cy="{y:.1f}" r="4">',
        f'<path class="fill c1" d="M{x - 4:.1f} {y - 4:.1f}h8v8h-8z">',
        f'<path class="fill c2" d="M{x:.1f} {y - 5.5:.1f}l5 9h-10z">',
        f'<path class="fill c3" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5-5.5z">',
    )
    shape = shapes[index % 4]
    return f"{shape}<title>{escape(tip)}</title></{shape[1:].split()[0]}>"


def _binned(points: Sequence[Point]) -> list[Point]:
    size = _neighbours(len(points))
    if size <= 1:
        return list(points)
    means: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part if value is not None]
        means.append((part[0][0], sum(values) / len(values) if values else None))
    return means


def _smoothed(points: Sequence[Point]) -> list[Point]:
    half = _half_window(len(points))
    means: list[Point] = []
    for i, (x, _) in enumerate(points):
        values = [value for _, value in points[max(0, i - half) : i + half + 1] if value is not None]
        means.append((x, sum(values) / len(values) if values else None))
    return means


def _number(value: float) -> str:
    return f"{value:.6g}".replace("e-0", "e-").replace("-", "−")


def _svg(content: str, title: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"{head}{content}</svg>"
