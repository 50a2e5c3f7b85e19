"""Two results side by side: ratios, and whether the samples differ beyond noise."""

from __future__ import annotations

from edgeprompt.bench.report import Report, readable
from edgeprompt.bench.statistics import mann_whitney

SIGNIFICANT = 0.05
HIGHER_IS_BETTER = ("tokens/s", "examples/s")


def compare(new: Report, old: Report) -> str:
    """A Markdown table of medians, new over old, with the p-value of Mann and Whitney's test.

    Results are matched by test and setting; what only one of them has is counted. A generated text that differs, or
    another device or package, is said in front, because a ratio means less then.
    """
    before = {result.key: result for result in old.results}
    pairs = [(result, before[result.key]) for result in new.results if result.key in before]
    lines = [f"## Compared with {old.test_time}", ""]
    for name, ours, theirs in (
        ("device", new.device.get("cpu"), old.device.get("cpu")),
        ("package", new.package.get("hash"), old.package.get("hash")),
        ("edgeprompt", new.device.get("edgeprompt"), old.device.get("edgeprompt")),
    ):
        if ours != theirs:
            lines.append(f"- another {name}: {theirs} before, {ours} now")
    different = {
        (now.prompt, now.batch_size) for now, then in pairs if then.output_hash and now.output_hash != then.output_hash
    }
    lines += [
        f"- prompt {prompt!r}, batch {batch}: generated tokens differ" for prompt, batch in sorted(different, key=str)
    ]
    alone = len(new.results) + len(old.results) - 2 * len(pairs)
    if alone:
        lines.append(f"- {alone} results are in one of the two only")
    lines += [
        "",
        "| test | prompt | provider | threads | batch | text | new | tasks | before | now | ratio | p | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for now, then in pairs:
        ours, theirs = now.summary, then.summary
        if ours is None or theirs is None:
            continue
        chance = mann_whitney(now.samples, then.samples)
        cells = [
            now.test, now.prompt or "", now.provider, now.n_threads or "all", now.batch_size, now.n_prompt, now.n_gen,
            now.n_tasks, readable(theirs.p50, then.unit), readable(ours.p50, now.unit),
            f"{ours.p50 / theirs.p50:.3f}" if theirs.p50 > 0 < ours.p50 else "", f"{chance:.3f}",
            _verdict(ours.p50, theirs.p50, now.unit, chance, min(ours.n, theirs.n)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", f"p: Mann and Whitney's test, two-sided; below {SIGNIFICANT} the samples differ beyond noise.", ""]
    return "\n".join(lines)


def _verdict(now: float, then: float, unit: str, chance: float, samples: int) -> str:
    if samples < 4:
        return "too few samples"
    if chance >= SIGNIFICANT:
        return "same within noise"
    return "better" if (now > then) == (unit in HIGHER_IS_BETTER) else "worse"
