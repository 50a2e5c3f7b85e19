"""The README's picture, from committed results: `python -m benchmarks.peers.picture`.

Left: what tasks cost in memory, beside a fine-tuned copy of the model for each. Right: what a task costs a request.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/bench-smollm2-int4.json"
PICTURE = ROOT / "docs/tasks.svg"
OURS, OTHERS, INK = "#0072b2", "#d55e00", "#7f868e"
TEXT_TOKENS, THREADS = 32, 2


def memory(report: dict[str, Any]) -> list[tuple[int, float]]:
    """(tasks, peak resident set in MB), by number of tasks."""
    rows = (row for row in report["results"] if row["test"] == "peak_rss")
    return sorted((row["n_tasks"], row["p50"] / 1e6) for row in rows)


def first_token(report: dict[str, Any]) -> dict[str, float]:
    """What stands before the text -> milliseconds to the first token."""
    names = {"ttft_none": "nothing", "ttft_cached": "soft prompt,\n16 tokens", "ttft_hard": "instruction\nas text"}
    found = {}
    for test, name in names.items():
        row = next(
            row
            for row in report["results"]
            if row["test"] == test and row["n_threads"] == THREADS and row["batch_size"] == 1
        )
        found[name] = row["p50"] / 1e6
    return found


def draw(report: dict[str, Any], target: Path) -> None:
    """Write the picture as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    figure.patch.set_alpha(0)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    tasks, megabytes = zip(*memory(report), strict=True)
    copy = report["package"]["size_bytes"] / 1e6
    left.plot(tasks, megabytes, "o-", color=OURS)
    left.plot(tasks, [megabytes[0] + copy * (count - 1) for count in tasks], "--", color=OTHERS)
    left.text(tasks[1], megabytes[1] * 0.42, "one model, a soft prompt for each task", color=OURS)
    left.text(1, 4e4, "a fine-tuned model for each task\n(computed)", color=OTHERS)
    left.set(xscale="log", yscale="log", xlabel="tasks", title="Memory (MB)", ylim=(50, 3e5), xlim=(0.8, 1500))
    left.set_xticks(tasks, [f"{count:,}" for count in tasks])
    bars = first_token(report)
    drawn = right.bar(list(bars), list(bars.values()), color=[INK, OURS, OTHERS], width=0.6)
    right.bar_label(drawn, fmt="%.0f", color=INK)
    right.set(title=f"Time to first token (ms), text of {TEXT_TOKENS} tokens", ylim=(0, max(bars.values()) * 1.2))
    for axes in (left, right):
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK, which="both")
        axes.title.set(color=INK, fontsize=10)
        axes.xaxis.label.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set(color=INK, visible=side in ("left", "bottom"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgeprompt"}):
        figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(RESULT.read_text(encoding="utf-8")), PICTURE)
    print(PICTURE.relative_to(ROOT))
