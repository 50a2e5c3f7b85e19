"""From a result file to the tables of README.md and docs/benchmarks.md: `python -m benchmarks.peers.table`."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.peers import starts as cold
from benchmarks.peers.cores import APART

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parents[1] / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
GUESSING = 0.6
"""A peer whose labels agree less with those of PyTorch in fp32 does not do the work: of two labels, half are right."""
OURS = ("edgeprompt", "edgeprompt-int4-128", "edgeprompt-int8")
"""Packages of ours that are compared with every peer."""

MEASURES = (
    ("TTFT, prompt resident (ms)", lambda r: statistics.median(r["ttft_cached"]["32"]) * 1e3, False),
    ("TTFT, prompt run again (ms)", lambda r: _median(r.get("ttft_uncached", {}).get("32")), False),
    ("decode (tokens/s)", lambda r: statistics.median(r["decode"]), True),
    ("classification (texts/s)", lambda r: r["classify"], True),
    ("peak RSS (MB)", lambda r: r["peak_rss"] / 1e6, False),
)
"""(title, value of one round, whether more is better)"""


def _median(seconds: list[float] | None) -> float:
    """In milliseconds; not a number where it was not measured."""
    return statistics.median(seconds) * 1e3 if seconds else math.nan


IN_README = ("edgeprompt", "edgeprompt-int8", "llamacpp", "genai-pruned", "pytorch", "optimum")
"""Peers of the README's table, and of its columns the places in MEASURES; docs/benchmarks.md has all."""
README_MEASURES = (0, 2, 3, 4)

REFERENCE = "reference"
"""Peers that compute what the weights of the file say, in float32: the others are compared with them."""
PEER, OTHERS = "llama.cpp, the file itself", "kl-120-sentences.json"
KL_OF = {
    "edgeprompt": "int4",
    "edgeprompt-torch": "int4",
    "edgeprompt-int4-128": "int4-128",
    "edgeprompt-int8": "int8",
    "llamacpp": PEER,
    "genai": "onnxruntime-genai, int4",
    "genai-pruned": "onnxruntime-genai, int4",
    "pytorch": REFERENCE,
    "optimum": REFERENCE,
}
"""Which figure of `benchmarks.quality.kl` a peer has; the others were not measured."""
BASES = {"SmolLM2-135M-Instruct.Q4_1": "smollm2", "gemma-3-270m-q4_k_m": "gemma3"}
FAITHFUL, FAST, UNKNOWN = "faithful", "fast", "KL not measured"
MOST_KL = 1.5
"""What is faithful has at most so many times the KL divergence of llama.cpp on the same file."""


@dataclass(frozen=True)
class Divergence:
    """A mean KL divergence from a file's weights, the most that is faithful, and whether it is of the earlier run."""

    mean: float
    limit: float
    earlier: bool = False


Divergences: TypeAlias = dict[str, Divergence]

RATIO = "ratio of medians (lowest to highest of any two rounds)"
HEAD = ["| | KL | " + " | ".join(title for title, _, _ in MEASURES) + " |", "|" + " --- |" * (len(MEASURES) + 2)]


def divergences(model: str, folder: Path = RESULTS) -> Divergences:
    """What was measured of a model: from kl.json, and from an earlier run what is missing there."""
    base, found = BASES.get(model, model), Divergences()
    for name in ("kl.json", OTHERS):
        file = folder / name
        parts = json.loads(file.read_text("utf-8"))["bases"].get(base, {}) if file.exists() else {}
        if PEER in parts:
            limit = MOST_KL * parts[PEER]["kl_mean"]
            made = {key: Divergence(value["kl_mean"], limit, name == OTHERS) for key, value in parts.items()}
            found = {**made, **found}
    return {**found, REFERENCE: Divergence(0.0, 0.0)} if found else found


def group_of(peer: str, kl: Divergences) -> str:
    """Whether a peer computes what the file says as well as llama.cpp does."""
    found = kl.get(KL_OF.get(peer, ""))
    if found is None:
        return UNKNOWN
    return FAITHFUL if found.mean <= found.limit else FAST


def _kl(peer: str, kl: Divergences) -> str:
    found = kl.get(KL_OF.get(peer, ""))
    if found is None:
        return ""
    return "0" if not found.mean else f"{'~' * found.earlier}{found.mean:.2g}"


def _grouped(rows: list[tuple[str, str]], kl: Divergences) -> list[str]:
    """Rows of (peer, line), each group behind a line with its name."""
    if not kl:
        return [line for _, line in rows]
    lines = []
    for group in (FAITHFUL, FAST, UNKNOWN):
        inside = [line for peer, line in rows if group_of(peer, kl) == group]
        if inside:
            lines += [f"| *{group}* |" + " |" * (inside[0].count(" | ")), *inside]
    return lines


def _explained(kl: Divergences) -> str:
    if not kl:
        return "The KL divergence from the weights of the file was not measured for this model."
    earlier = " ~: of an earlier run on 120 sentences, rounded." if any(one.earlier for one in kl.values()) else ""
    return (
        "KL: mean divergence of the next token from the weights of the file in float32. *Faithful* has at most "
        f"{MOST_KL} times llama.cpp's; *fast* computes something else, which a prompt must be tuned for.{earlier}"
    )


def undisturbed(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the rounds and sweeps of every peer during which cores stayed together, or all where none did."""
    measured = [one for peer in result["peers"].values() for one in (*peer["rounds"], *peer.get("sweeps", ()))]
    trips = [trip for one in measured for trip in one.get("core_round_trip_ns", ()) if trip is not None]
    limit = APART * min(trips, default=0)

    def kept(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one for one in made if max(one.get("core_round_trip_ns") or [0]) <= limit] or made

    peers = {
        name: {
            **peer,
            "rounds": kept(peer["rounds"]),
            "sweeps": [one for alike in _by_prompts(peer.get("sweeps", [])) for one in kept(alike)],
        }
        for name, peer in result["peers"].items()
    }
    return {**result, "peers": peers}


def _by_prompts(sweeps: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Sweeps over the same lengths of prompt together; each is one of them (results before that: all in one)."""
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for sweep in sweeps:
        found.setdefault(tuple(sorted({cell["prompt"] for cell in sweep["sweep"]})), []).append(sweep)
    return list(found.values())


def to_markdown(result: dict[str, Any], starts: dict[str, Any] | None = None, kl: Divergences | None = None) -> str:
    """Medians of rounds, and where and how it was measured; `starts`, of `benchmarks.peers.starts`, adds a column."""
    kl = kl or {}
    lines, rounds, rows = (
        [*HEAD],
        max(len(peer["rounds"]) for peer in result["peers"].values()),
        list[tuple[str, str]](),
    )
    if starts is not None:
        lines = [HEAD[0] + " cold start (s) |", HEAD[1] + " --- |"]
    result = undisturbed(result)
    for name, peer in result["peers"].items():
        if peer["rounds"]:
            cells = [_shown(statistics.median(value(r) for r in peer["rounds"])) for _, value, _ in MEASURES]
        else:
            cells = ["absent"] * len(MEASURES)
        if starts is not None:
            seconds = starts["seconds"].get(peer["title"], {}).get(cold.STATES[0])
            cells.append(_shown(statistics.median(seconds)) if seconds else "absent")
        rows.append((name, f"| {peer['title']} | {_kl(name, kl)} | " + " | ".join(cells) + " |"))
    return "\n".join([*lines, *_grouped(rows, kl), "", _explained(kl), "", *_notes(result, rounds)]) + "\n"


def summary_to_markdown(result: dict[str, Any], kl: Divergences | None = None) -> str:
    """The README's table: at most six peers by quality, with the share of labels that are PyTorch's."""
    kl = kl or {}
    result = undisturbed(result)
    measures, agree = [MEASURES[place] for place in README_MEASURES], _agreement(result["peers"]) | {"pytorch": 1.0}
    rows = list[tuple[str, str]]()
    titles = ["", "KL", *(title for title, _, _ in measures), "labels as PyTorch fp32"]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for name in IN_README:
        peer = result["peers"].get(name)
        if peer is None or not peer["rounds"]:
            continue
        cells = [_shown(statistics.median(value(r) for r in peer["rounds"])) for _, value, _ in measures]
        cells = [_kl(name, kl), *cells, f"{agree.get(name, math.nan):.0%}"]
        rows.append((name, f"| {peer['title']} | {' | '.join(cells)} |"))
    device = result["device"]
    lines += [
        *_grouped(rows, kl),
        "",
        _explained(kl),
        f"{result['model']}, {result['threads']} threads, 16-token prompt, 32-token text. {device['cpu']} "
        f"({', '.join(device['isa'])}), {result['time'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def ratios_to_markdown(result: dict[str, Any], kl: Divergences | None = None) -> str:
    """Ratios of medians to each package of ours, with the lowest and highest of any two rounds."""
    kl = kl or {}
    peers, lines = undisturbed(result)["peers"], []
    for name in OURS:
        ours = peers.get(name, {}).get("rounds")
        others = {
            other: peer for other, peer in peers.items() if peer["rounds"] and other != name and not _twin(other, name)
        }
        if not ours or not others:
            continue
        own = f" ({group_of(name, kl)}, KL {_kl(name, kl)})" if kl else ""
        lines += [f"How many times better {peers[name]['title']}{own}, is: {RATIO}.", "", *HEAD]
        rows = list[tuple[str, str]]()
        for other, peer in others.items():
            cells = [_kl(other, kl), *(_ratio(ours, peer["rounds"], value, more) for _, value, more in MEASURES)]
            rows.append((other, f"| {peer['title']} | " + " | ".join(cells) + " |"))
        lines += [*_grouped(rows, kl), ""]
    return "\n".join(lines)


def sweep_to_markdown(result: dict[str, Any], kl: Divergences | None = None) -> str:
    """First token and decoding for every length of prompt and text, ours and the best of the peers."""
    peers = undisturbed(result)["peers"]
    medians = {name: _cells(peer["sweeps"]) for name, peer in peers.items() if peer.get("sweeps")}
    ours = [name for name in OURS if name in medians]
    guess = {name for name, share in _agreement(peers).items() if share < GUESSING}
    others = [name for name in medians if not name.startswith("edgeprompt") and name not in guess]
    short = [peers[name]["title"].removeprefix("edgeprompt, ") for name in ours]
    lines = [
        f"| prompt, text (tokens) | {' | '.join(f'TTFT, {title} (ms)' for title in short)} | best peer | "
        f"{' | '.join(f'decode, {title} (tokens/s)' for title in short)} | best peer |",
        "|" + " --- |" * (2 * len(ours) + 3),
    ]
    for cell in medians[ours[0]] if ours else ():
        first = [medians[name][cell][0] for name in ours]
        speed = [medians[name][cell][1] for name in ours]
        quick = min(others, key=lambda name: medians[name][cell][0])
        fast = max(others, key=lambda name: medians[name][cell][1])
        best_first, best_speed = medians[quick][cell][0], medians[fast][cell][1]
        lines.append(
            f"| {cell[0]}, {cell[1]} | "
            + " | ".join(f"{1e3 * value:.1f} ({value / best_first:.2f})" for value in first)
            + f" | {1e3 * best_first:.1f} ({peers[quick]['title']}) | "
            + " | ".join(f"{value:.0f} ({value / best_speed:.2f})" for value in speed)
            + f" | {best_speed:.0f} ({peers[fast]['title']}) |"
        )
    made = [alike for peer in result["peers"].values() for alike in _by_prompts(peer.get("sweeps", []))]
    rounds = max(map(len, made), default=0)
    note = f"Medians of three texts, {rounds} rounds; in brackets the ratio to the best peer."
    if kl:
        classes = [
            f"{peers[name]['title']} {group_of(name, kl)} (KL {_kl(name, kl)})" for name in medians if _kl(name, kl)
        ]
        note += f" Compare within a class: {', '.join(classes)}."
    if guess:
        left_out = ", ".join(peers[name]["title"] for name in medians if name in guess)
        note += f" Left out, since its labels are not better than a guess: {left_out}."
    return "\n".join([*lines, "", note]) + "\n"


def _cells(sweeps: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[float, float]]:
    """(prompt, text) -> medians of seconds to the first token and of tokens/s."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for sweep in sweeps:
        for cell in sweep["sweep"]:
            found.setdefault((cell["prompt"], cell["text"]), []).append(cell)
    return {
        key: (
            statistics.median(value for cell in cells for value in cell["ttft"]),
            statistics.median(value for cell in cells for value in cell["decode"]),
        )
        for key, cells in found.items()
    }


def _twin(other: str, name: str) -> bool:
    """Whether the pair has stood in the first table of ratios already."""
    return name != "edgeprompt" and other.startswith("edgeprompt")


def _notes(result: dict[str, Any], rounds: int) -> list[str]:
    device, peers = result["device"], result["peers"]
    notes = [
        f"{result['model']}, {result['threads']} threads, one sequence at a time, 16-token prompt, 32-token text, 64 "
        "new tokens, 256 review snippets (each peer at its best batch size, edgeprompt with a worker for each thread); "
        f"{rounds} rounds in turn, every measurement in a process of its own; those during which the host had moved "
        "the cores apart were made again, at most twice, and are left out where a peer has others. "
        f"{device['cpu']} ({', '.join(device['isa'])}), {result['time'][:10]}.",
        "",
    ]
    speed = statistics.median(result["ceiling_bytes_per_second"])
    if peers["edgeprompt"]["rounds"]:
        decode = statistics.median(statistics.median(r["decode"]) for r in peers["edgeprompt"]["rounds"])
        bound = speed / result["weight_bytes"]
        notes += [
            f"Memory reads {speed / 1e9:.1f} GB/s in the same run; {result['weight_bytes'] / 1e6:.0f} MB of weights a "
            f"token bound decoding at {bound:.0f} tokens/s, of which edgeprompt reaches {decode / bound:.0%}.",
            "",
        ]
    shares = [f"{peers[name]['title']} {share:.0%}" for name, share in _agreement(peers).items()]
    if shares:
        notes += [f"Labels equal to those of PyTorch in fp32: {', '.join(shares)}.", ""]
    notes += [f"{peer['title']}: absent ({peer['absent']})" for peer in peers.values() if peer.get("absent")]
    notes += [f"{peer['title']}: {peer['note']}" for peer in peers.values() if peer.get("note")]
    return notes


def _agreement(peers: dict[str, Any]) -> dict[str, float]:
    """How often each peer's label is that of PyTorch in fp32 (a fast wrong answer shows)."""
    reference = peers.get("pytorch", {}).get("rounds")
    if not reference:
        return {}
    truth = reference[0]["labels"]
    return {
        name: statistics.fmean(a == b for a, b in zip(peer["rounds"][0]["labels"], truth, strict=True))
        for name, peer in peers.items()
        if peer["rounds"] and name != "pytorch"
    }


def _ratio(ours: list[Any], theirs: list[Any], value: Any, more: bool) -> str:
    def better(a: float, b: float) -> float:
        return a / b if more else b / a

    if any(math.isnan(value(r)) for r in (*ours, *theirs)):
        return "not measured"
    middle = better(statistics.median(value(r) for r in ours), statistics.median(value(r) for r in theirs))
    pairs = [better(value(a), value(b)) for a, b in product(ours, theirs)]
    return f"{middle:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def _shown(value: float) -> str:
    if math.isnan(value):
        return "not measured"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def newest() -> Path:
    """The newest committed result of a comparison with peers."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    peers = [
        path
        for path, result in found.items()
        if isinstance(result, dict) and result.get("format") == "edgeprompt-peers"
    ]
    if not peers:
        raise SystemExit(f"no comparison with peers in {RESULTS.name}/; run python -m benchmarks")
    return max(peers, key=lambda path: str(found[path]["time"]))


def write_table(document: Path, table: str) -> None:
    """Put a table between a document's markers."""
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{document.name} lacks the markers {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Write the tables of the result that is named, or of the newest."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    result = json.loads(file.read_text(encoding="utf-8"))
    starts = json.loads(cold.RESULT.read_text(encoding="utf-8")) if cold.RESULT.exists() else None
    kl = divergences(result["model"])
    write_table(ROOT / "README.md", summary_to_markdown(result, kl))
    tables = (to_markdown(result, starts, kl), ratios_to_markdown(result, kl), sweep_to_markdown(result, kl))
    write_table(ROOT / "docs/benchmarks.md", "\n".join(tables))


if __name__ == "__main__":
    main()
