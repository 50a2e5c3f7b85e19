"""The report as one HTML page without anything outside it: tables, and plots as SVG (matplotlib, extra `plot`)."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from edgeprompt.bench.report import DEFINITIONS, EXCLUDED, Report, Result, readable
from edgeprompt.errors import MissingDependencyError


def require_plots() -> Any:
    """The matplotlib module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("--format html needs matplotlib: pip install 'edgeprompt[plot]'") from error
    return matplotlib


def to_html(report: Report) -> str:
    """The page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plots = [
        ("Latency distribution", _distribution),
        ("Time to the first answer against text length", _against_length),
        ("Memory against number of tasks", _against_tasks),
        ("Throughput against rows per call", _against_batch),
    ]
    figures = [
        f"<figure><figcaption>{title}</figcaption>{svg}</figure>"
        for title, draw in plots
        if (svg := _draw(draw, report.results)) is not None
    ]
    page = Template(files("edgeprompt.bench").joinpath("page.html").read_text(encoding="utf-8"))
    device = {**report.device, "throttling": report.throttling}
    return page.substitute(
        title=html.escape(f"edgeprompt bench: {report.package['model']} ({report.package['precision']})"),
        time=html.escape(report.test_time),
        excluded=html.escape(EXCLUDED),
        device=_facts(device),
        package=_facts(report.package),
        figures="\n".join(figures),
        results=_results(report),
        definitions="\n".join(
            f"<dt>{test}</dt><dd>{html.escape(DEFINITIONS[test])}</dd>"
            for test in dict.fromkeys(result.test for result in report.results)
        ),
    )


def _facts(facts: Any) -> str:
    rows = []
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"<tr><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>")
    return "\n".join(rows)


def _results(report: Report) -> str:
    rows = []
    for result in report.results:
        found = result.summary
        numbers = (
            ["no counter"] * 6
            if found is None
            else [
                readable(getattr(found, name), result.unit) for name in ("p50", "mean", "stddev", "p90", "p95", "p99")
            ]
        )
        cells = [
            result.test, result.prompt or "", result.provider, result.n_threads or "all", result.batch_size,
            result.n_prompt, result.n_gen, result.n_depth, result.n_tasks, found.n if found else 0, *numbers,
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _draw(draw: Callable[[Any, Sequence[Result]], bool], results: Sequence[Result]) -> str | None:
    """A plot as an SVG element; None where there is nothing to plot."""
    matplotlib = require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    if not draw(axes, results):
        return None
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _distribution(axes: Any, results: Sequence[Result]) -> bool:
    """Share of samples at or below a latency."""
    shown = [r for r in results if r.samples and (r.test.startswith(("ttft", "latency_")) or r.test in ("tpot", "itl"))]
    shortest = min((r.n_prompt for r in shown), default=0)
    for result in shown:
        if result.n_prompt not in (0, shortest) and result.test != "ttft_hard":
            continue
        ordered = sorted(result.samples)
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        axes.step([value / 1e6 for value in ordered], shares, where="post", label=_label(result))
    axes.set(xlabel="milliseconds", ylabel="share of samples", xscale="log")
    return bool(shown)


def _against_length(axes: Any, results: Sequence[Result]) -> bool:
    shown = [r for r in results if r.test.startswith(("ttft", "latency_")) and r.test != "ttft_hard"]
    _lines(axes, shown, lambda result: result.n_prompt, 1e6)
    axes.set(xlabel="tokens of the text", ylabel="milliseconds (p50)", ylim=(0, None))
    return bool(shown)


def _against_tasks(axes: Any, results: Sequence[Result]) -> bool:
    shown = [r for r in results if r.test.startswith("peak_rss")]
    _lines(axes, shown, lambda result: result.n_tasks, 1e6)
    axes.set(xlabel="prompts loaded", ylabel="MB", xscale="log", ylim=(0, None))
    return bool(shown)


def _against_batch(axes: Any, results: Sequence[Result]) -> bool:
    shown = [r for r in results if r.test in ("decode", "classify", "embed") and r.samples]
    _lines(axes, shown, lambda result: result.batch_size, 1)
    axes.set(xlabel="rows per call", ylabel="tokens/s or texts/s (p50)", ylim=(0, None))
    return bool(shown)


def _lines(axes: Any, results: Sequence[Result], place: Callable[[Result], int], scale: float) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        if result.summary is not None:
            lines.setdefault(_label(result), []).append((place(result), result.summary.p50 / scale))
    for label, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", label=label)


def _label(result: Result) -> str:
    threads = f", {result.n_threads} threads" if result.n_threads else ""
    return f"{result.test} ({result.prompt or 'no prompt'}, {result.provider}{threads})"
