"""Plots as SVG text, drawn by matplotlib (extra `plot`), for the HTML report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from edgeprompt.errors import MissingDependencyError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#a6761d")
"""Okabe and Ito's palette, which people with colour blindness can tell apart, and two more."""

_INK = "#7f868e"
"""Grey that can be read on light and on dark pages."""
_WIDTH, _HEIGHT = 6.2, 3.3
"""Inches; matplotlib writes 72 points an inch."""

Point = tuple[float, float]


def require_matplotlib() -> Any:
    """matplotlib's `Figure` class, which needs no display.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib; run: pip install 'edgeprompt[plot]'") from error
    return Figure


def line_plot(lines: Mapping[str, Sequence[Point]], *, x: str, y: str, log_x: bool = False) -> str:
    """Lines through points, with a legend.

    Args:
        lines: label -> points.
        x: title of the horizontal axis.
        y: title of the vertical axis, which starts at 0.
        log_x: whether the horizontal axis is logarithmic.
    """
    figure, axes = _axes(_HEIGHT)
    for colour, (label, points) in zip(_colours(len(lines)), lines.items(), strict=True):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, color=colour, label=label)
    axes.set_ylim(bottom=0)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return _svg(figure)


def strip_plot(rows: Mapping[str, Sequence[float]], *, x: str) -> str:
    """Each row's samples as dots on one logarithmic axis, with a bar at the median.

    Args:
        rows: label -> samples, above 0.
        x: title of the axis.
    """
    import numpy as np

    figure, axes = _axes(0.9 + 0.3 * len(rows))
    for place, samples in enumerate(rows.values()):
        axes.plot(samples, [place] * len(samples), "o", markersize=4, alpha=0.35, color=COLOURS[0])
        axes.plot([float(np.median(samples))], [place], "|", markersize=14, markeredgewidth=2, color=COLOURS[1])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def _axes(height: float) -> tuple[Any, Any]:
    figure = require_matplotlib()(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=8)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    return figure, axes


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _svg(figure: Any) -> str:
    """The figure as an `<svg>` element: text stays text, and the same figure gives the same bytes."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgeprompt", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
