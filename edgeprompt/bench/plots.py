"""Plots as SVG text: lines and strips of samples, drawn here so that a device needs no plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#a6761d")
"""Okabe and Ito's palette, which people with colour blindness can tell apart, and two more."""

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44
_LABELS = 150
_ROW = 24

Point = tuple[float, float]


class _Axis:
    """Values to pixels, linear from 0 or logarithmic, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self._start, self._end, self._log = start, end, log
        low, high = min(values), max(values)
        if log:
            self._low, self._high = math.log10(low), math.log10(high)
            room = max(0.04 * (self._high - self._low), 0.02)
            self._low, self._high = self._low - room, self._high + room
        else:
            self._low, self._high = min(0.0, low), (high or 1.0) * 1.06

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self._log else value
        return self._start + (self._end - self._start) * (place - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        if not self._log:
            step = _round_step((self._high - self._low) / 5)
            first, last = math.ceil(self._low / step), math.floor(self._high / step)
            return [number * step for number in range(first, last + 1)]
        steps = (1, 2, 5) if self._high - self._low < 2.5 else (1,)
        decades = range(math.floor(self._low), math.ceil(self._high) + 1)
        found = [digit * 10.0**decade for decade in decades for digit in steps]
        return [value for value in found if self._low <= math.log10(value) <= self._high]


def line_plot(lines: Mapping[str, Sequence[Point]], *, x: str, y: str, log_x: bool = False) -> str:
    """Lines through points, with a legend; `x` and `y` are the titles of the axes."""
    points = [point for line in lines.values() for point in line]
    across = _Axis([point[0] for point in points], _LEFT, WIDTH - _RIGHT, log=log_x)
    up = _Axis([point[1] for point in points], HEIGHT - _BOTTOM, _TOP, log=False)
    parts = [*_grid(across, up), *_titles(x, y)]
    for colour, (label, line) in zip(_colours(len(lines)), lines.items(), strict=True):
        places = [(across(point[0]), up(point[1])) for point in sorted(line)]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
            f'points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'
        )
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"><title>{html.escape(label)}: '
            f"{_number(point[1])} at {_number(point[0])}</title></circle>"
            for (a, b), point in zip(places, sorted(line), strict=True)
        ]
    return _svg(parts, HEIGHT) + _legend(list(lines))


def strip_plot(rows: Mapping[str, Sequence[float]], *, x: str) -> str:
    """Each row's samples as dots on one logarithmic axis, with a bar at the median."""
    height = _TOP + _ROW * len(rows) + _BOTTOM
    values = [value for row in rows.values() for value in row]
    across = _Axis(values, _LABELS, WIDTH - _RIGHT, log=True)
    parts = []
    for tick in across.ticks():
        place = across(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(_text(place, height - _BOTTOM + 16, _number(tick)))
    parts.append(_text((_LABELS + WIDTH - _RIGHT) / 2, height - 8, x))
    for number, (label, samples) in enumerate(rows.items()):
        middle, colour = _TOP + _ROW * (number + 0.5), COLOURS[0]
        ordered = sorted(samples)
        median = across(ordered[len(ordered) // 2])
        parts.append(_text(_LABELS - 8, middle + 4, label, anchor="end"))
        parts += [
            f'<circle cx="{across(value):.1f}" cy="{middle:.1f}" r="3.5" fill="{colour}" fill-opacity="0.35"/>'
            for value in ordered
        ]
        parts.append(
            f'<line x1="{median:.1f}" x2="{median:.1f}" y1="{middle - 8:.1f}" y2="{middle + 8:.1f}" '
            f'stroke="{COLOURS[1]}" stroke-width="2"/>'
        )
    return _svg(parts, height)


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for tick in up.ticks():
        place = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text(_LEFT - 6, place + 4, _number(tick), anchor="end"))
    for tick in across.ticks():
        place = across(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(_text(place, HEIGHT - _BOTTOM + 16, _number(tick)))
    return parts


def _titles(x: str, y: str) -> list[str]:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return [
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, x),
        f'<text text-anchor="middle" transform="translate(14 {middle:.0f}) rotate(-90)">{html.escape(y)}</text>',
    ]


def _legend(labels: Sequence[str]) -> str:
    entries = (
        f'<li><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="5" fill="{colour}"/></svg> '
        f"{html.escape(label)}</li>"
        for colour, label in zip(_colours(len(labels)), labels, strict=True)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) >= 10 or value == int(value) else f"{value:.3g}"


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
