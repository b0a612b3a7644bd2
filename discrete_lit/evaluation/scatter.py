"""A figure of points with names, as SVG inside of HTML pages, and the style of these pages."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Sequence
from math import isfinite, log10

PAGE_STYLE = (
    '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"><style>'
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em}"
    "div{overflow-x:auto}table{border-collapse:collapse}"
    "th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #8888}"
    "th:first-child,td:first-child{text-align:left}li{overflow-wrap:anywhere}"
    "figure{display:inline-block;margin:1em 0}"
    "svg{font:11px system-ui,sans-serif;fill:currentColor;max-width:100%;height:auto}</style>"
)
"""Style of a page with a table and figures, in the browser's light or dark setting and on a phone's width."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 340, 60, 45, 20, 140
_LINE, _LETTER = 12.0, 5.8  # pixels of a line of text, and of a letter in the mean
_MARK, _OTHER = "#3b82c4", "#8a8a8a"


def scatter(
    points: Sequence[tuple[str, float, float, float]],
    *,
    x_name: str,
    y_name: str,
    logarithmic: bool,
    front: Collection[int] | None = None,
) -> str:
    """Draw points as an SVG figure of HTML.

    Args:
        points: name, x, y, and deviation of y of each; a name is drawn where it covers no other one.
        x_name: of the axis.
        y_name: of the other.
        logarithmic: whether x, above 0, is.
        front: numbers of the points that no other one beats: a line joins them, and the others are grey.
    """
    xs = [log10(x) if logarithmic else x for _, x, _, _ in points]
    lows, highs = [y - d for _, _, y, d in points], [y + d for _, _, y, d in points]
    x_first, x_last, x_of = _scale(xs, _LEFT, _WIDTH - _RIGHT)
    y_first, y_last, y_of = _scale([*lows, *highs], _HEIGHT - _BOTTOM, _TOP)
    places = [(x_of(x), y_of(point[2])) for x, point in zip(xs, points, strict=True)]
    assert all(isfinite(x) and isfinite(y) for x, y in places)
    parts = [
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
        f"<title>{html.escape(y_name)} against {html.escape(x_name)}</title>",
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="{_OTHER}"/>',
    ]
    for step in range(5):
        x, y = (first + (last - first) * step / 4 for first, last in ((x_first, x_last), (y_first, y_last)))
        shown = 10**x if logarithmic else x
        parts.append(
            f'<text x="{x_of(x):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_tick(shown)}</text>'
            f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_tick(y)}</text>'
        )
    if front is not None:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(places[number] for number in front))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_MARK}"/>')
    for number, ((x, y), (_, _, value, deviation)) in enumerate(zip(places, points, strict=True)):
        colour = _MARK if front is None or number in front else _OTHER
        if deviation:
            parts.append(
                f'<path d="M{x:.1f} {y_of(value - deviation):.1f}V{y_of(value + deviation):.1f}" stroke="{colour}"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    parts += _labels([name for name, _, _, _ in points], places)
    unit = f"{x_name} (logarithmic)" if logarithmic else x_name
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(unit)}</text>'
        f'<text x="{_LEFT}" y="{_TOP - 8}">{html.escape(y_name)}</text></svg></figure>\n'
    )
    return "".join(parts)


def _scale(values: Sequence[float], low: float, high: float) -> tuple[float, float, Callable[[float], float]]:
    """Give the ends of an axis, and the function from a value to its pixel."""
    first, last = min(values), max(values)
    margin = 0.08 * (last - first) or 0.5 * abs(first) or 0.5
    first, last = first - margin, last + margin
    return first, last, lambda value: low + (value - first) / (last - first) * (high - low)


def _tick(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[str]:
    """Write the names beside their points, from the highest down, each moved to where it covers no other."""
    taken: list[tuple[float, float, float]] = []
    parts = []
    for number in sorted(range(len(names)), key=lambda number: places[number][::-1]):
        name, (x, y) = names[number], places[number]
        if not name:
            continue
        width = _LETTER * len(name)
        left = max(0.0, min(x + 7, _WIDTH - width))
        # Down or up by as little as it takes to be free, within the axes.
        moves = sorted(range(int(_TOP - y), int(_HEIGHT - _BOTTOM - y)), key=abs)
        free = (
            y + 4 + move
            for move in moves
            if not any(
                abs(y + 4 + move - other) < _LINE and left < end and start < left + width for start, end, other in taken
            )
        )
        baseline = next(free, y + 4)
        taken.append((left, left + width, baseline))
        if abs(baseline - y - 4) > _LINE:
            parts.append(
                f'<path d="M{x:.1f} {y:.1f}L{left - 1:.1f} {baseline - 4:.1f}" stroke="{_OTHER}" stroke-width=".5"/>'
            )
        parts.append(f'<text x="{left:.1f}" y="{baseline:.1f}">{html.escape(name)}</text>')
    return parts
