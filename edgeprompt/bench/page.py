"""The report as one HTML page without anything outside it: key figures, plots, tables."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from edgeprompt.bench.plots import line_plot, strip_plot
from edgeprompt.bench.report import DEFINITIONS, EXCLUDED, Report, Result, readable, weights

GROUPS = {
    "Loading": ("cold_start", "warm_load", "add_prompt", "swap"),
    "First answer": (
        *("ttft_cached", "ttft_rerun", "ttft_prompt", "ttft_none", "ttft_hard"),
        *("latency_prompt", "latency_none", "latency_hard"),
    ),
    "Computed once": (
        *("tasks_reused", "tasks_computed", "instruction_reused", "instruction_computed"),
        *("chat_turn_2_reused", "chat_turn_2_computed", "chat_turn_10_reused", "chat_turn_10_computed"),
    ),
    "Decoding": ("tpot", "itl", "decode", "decode_drafts", "drafted_tokens", "accepted_tokens", "energy"),
    "Throughput": ("prefill", "classify", "classify_workers", "embed", "embed_workers"),
    "Memory": ("peak_rss", "peak_rss_anonymous", "peak_rss_file", "prompt_disk", "prompt_resident"),
}
"""Title of a table -> its tests, in order."""

_SETTINGS = {
    "prompt": "prompt", "provider": "provider", "n_threads": "threads", "batch_size": "batch", "n_prompt": "text",
    "n_gen": "new", "n_depth": "cached", "n_tasks": "tasks",
}  # fmt: skip
_FIGURES = ("n", "min", "p50", "mean", "stddev", "p90", "p95", "p99")


def to_html(report: Report) -> str:
    """The page."""
    device, package, results = report.device, report.package, report.results
    page = Template(files("edgeprompt.bench").joinpath("page.html").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in device["versions"].items())
    throttled = (
        f"The same work took {report.throttling['slowdown']:.2f} times as long after as before: the device throttled, "
        "or did other work. Do not trust these figures."
    )
    return page.substitute(
        title=html.escape(f"{package['model']}, {weights(package)}: edgeprompt bench"),
        device_line=html.escape(
            f"{device['cpu']}, {device['cores_usable']} cores ({', '.join(device['isa']) or 'no known extensions'}), "
            f"{readable(device['memory_bytes'], 'bytes')} memory, {', '.join(device['gpu']) or 'no GPU'}"
        ),
        run_line=html.escape(f"{report.test_time}, edgeprompt {device['edgeprompt']}, {versions}"),
        warning=f'<p class="warn">{throttled}</p>' if report.throttling["seen"] else "",
        cards="\n".join(_cards(results)),
        figures="\n".join(
            f"<figure><figcaption>{title}</figcaption>{draw(shown)}</figure>"
            for title, choose, draw in _PLOTS
            if (shown := [result for result in results if result.samples and choose(result)])
        ),
        results="\n".join(_table(title, report, tests) for title, tests in GROUPS.items()),
        excluded=html.escape(EXCLUDED),
        definitions="\n".join(
            f"<dt>{test}</dt><dd>{html.escape(DEFINITIONS[test])}</dd>"
            for test in dict.fromkeys(result.test for result in results)
        ),
        device=_facts({**device, "throttling": report.throttling}),
        package=_facts(package),
        settings=_facts(report.settings),
    )


def _cards(results: Sequence[Result]) -> list[str]:
    """What people look for first, of the first prompt and setting that was measured."""
    first: dict[str, Result] = {}
    for result in results:
        if result.samples:
            first.setdefault(result.test, result)
    labelled = [result for result in results if result.test.startswith(("classify", "embed")) and result.summary]
    answer = next((first[test] for test in ("ttft_cached", "ttft_prompt", "latency_prompt") if test in first), None)
    best = max(labelled, key=lambda result: result.summary.p50 if result.summary else 0, default=None)
    wanted = [
        ("cold start", first.get("cold_start"), "process start to first answer"),
        ("first answer", answer, f"{answer.n_prompt} tokens of text" if answer else ""),
        ("decoding", first.get("decode"), "one row"),
        ("texts", best, f"{best.batch_size} a call" if best else ""),
        ("peak memory", first.get("peak_rss"), "one prompt"),
        ("each further prompt", first.get("prompt_resident"), "keys and values resident"),
    ]
    return [
        "<li>{}<b>{} <i>{}</i></b><small>{}</small></li>".format(
            label, *readable(result.summary.p50, result.unit).split(" "), html.escape(note)
        )
        for label, result, note in wanted
        if result is not None and result.summary is not None
    ]


def _facts(facts: Mapping[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"<tr><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>")
    return "\n".join(rows)


def _table(title: str, report: Report, tests: Sequence[str]) -> str:
    """Results of some tests; settings that are the same in all of them are left out."""
    found = sorted((r for r in report.results if r.test in tests), key=lambda result: tests.index(result.test))
    if not found:
        return ""
    # What belongs to no prompt says None: no reason to show a column.
    shown = [name for name in _SETTINGS if len({getattr(one, name) for one in found} - {None}) > 1]
    head = "".join(f'<th class="n">{name}</th>' for name in (*(_SETTINGS[name] for name in shown), *_FIGURES))
    rows = []
    for result in found:
        summary = result.summary
        cells = [str(getattr(result, name) or "") for name in shown]
        if summary is None:
            cells += ["0", result.absent, *[""] * (len(_FIGURES) - 2)]
            unit = result.unit
        else:
            figures = [readable(getattr(summary, name), result.unit).split(" ") for name in _FIGURES[1:]]
            cells += [str(summary.n), *(number for number, _ in figures)]
            unit = figures[0][1]
        numbers = "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr><td><code>{result.test}</code></td><td>{unit}</td>{numbers}</tr>")
    body = "\n".join(rows)
    hashes = "".join(
        f"<p class='soft'>Generated tokens, {result.batch_size} a call: SHA-256 <code>{result.output_hash}</code></p>"
        for result in found
        if result.output_hash
    )
    table = f'<div class="wide"><table><tr><th>test</th><th>unit</th>{head}</tr>\n{body}\n</table></div>'
    return f"<h3>{title}</h3>\n{table}{hashes}"


def _label(result: Result, among: Sequence[Result], *names: str) -> str:
    """The test, and which of the settings named tell it from the others."""
    parts = [
        f"{getattr(result, name) or 'all'} {_SETTINGS[name]}" if name in ("n_threads", "n_prompt") else
        str(getattr(result, name))
        for name in (*names, "prompt", "provider", "n_threads")
        if len({getattr(one, name) for one in among if name != "prompt" or one.prompt}) > 1 and getattr(result, name)
    ]  # fmt: skip
    return f"{result.test} ({', '.join(parts)})" if parts else result.test


def _strips(shown: Sequence[Result]) -> str:
    rows: dict[str, tuple[float, ...]] = {}
    order = [test for tests in GROUPS.values() for test in tests]
    for result in sorted(shown, key=lambda result: (order.index(result.test), result.n_prompt, result.batch_size)):
        label = f"{result.test} {result.n_prompt or ''}".strip() if result.test not in ("tpot", "itl") else result.test
        alike = [one for one in shown if one.test == result.test and one.n_prompt == result.n_prompt]
        if len(alike) > 1:
            label = _label(result, alike, "batch_size")
        rows[label] = tuple(value / 1e6 for value in result.samples)
    return strip_plot(rows, x="milliseconds")


def _lines(shown: Sequence[Result], place: str, scale: float, **axes: Any) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in shown:
        if result.summary is not None:
            point = (float(getattr(result, place)), result.summary.p50 / scale)
            lines.setdefault(_label(result, shown), []).append(point)
    return line_plot(lines, **axes)


_Plot = tuple[str, Callable[[Result], bool], Callable[[Sequence[Result]], str]]
_PLOTS: tuple[_Plot, ...] = (
    (
        "Latency: every sample, bar at the median",
        lambda result: result.test.startswith(("ttft", "latency_")) or result.test in ("tpot", "itl"),
        _strips,
    ),
    (
        "First answer against length of the text",
        lambda result: result.test.startswith(("ttft", "latency_")) and not result.test.endswith("_hard"),
        lambda shown: _lines(shown, "n_prompt", 1e6, x="tokens of the text", y="milliseconds (p50)"),
    ),
    (
        "Memory against number of prompts",
        lambda result: result.test.startswith("peak_rss"),
        lambda shown: _lines(shown, "n_tasks", 1e6, x="prompts loaded", y="MB", log_x=True),
    ),
    (
        "Throughput by batch size",
        lambda result: result.test in ("decode", "classify", "embed"),
        lambda shown: _lines(shown, "batch_size", 1, x="sequences in one call", y="tokens/s or texts/s (p50)"),
    ),
)
