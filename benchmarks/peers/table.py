"""From results to the tables of README.md and docs/benchmarks.md: `python -m benchmarks.peers.table`."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.peers.bases import BASES
from benchmarks.peers.cores import APART

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parents[1] / "results"
GUESSING = 0.6
"""A peer whose labels agree less with those of PyTorch in fp32 does not do the work: of two labels, half are right."""
OURS = ("edgeprompt", "edgeprompt-int4-128", "edgeprompt-int8")
"""Packages of ours that are compared with every peer."""

MEASURES = (
    ("TTFT, text of 32 tokens (ms)", lambda r: _median(r["ttft_cached"].get("32")), False),
    ("TTFT, text of 128 tokens (ms)", lambda r: _median(r["ttft_cached"].get("128")), False),
    ("TTFT, 32 tokens, prompt run again (ms)", lambda r: _median(r.get("ttft_uncached", {}).get("32")), False),
    ("decode (tokens/s)", lambda r: statistics.median(r["decode"]), True),
    ("classification (texts/s)", lambda r: r["classify"], True),
    ("peak RSS (MB)", lambda r: r["peak_rss"] / 1e6, False),
)
"""(title, value of one round, whether more is better)"""


def _median(seconds: list[float] | None) -> float:
    """In milliseconds; not a number where it was not measured."""
    return statistics.median(seconds) * 1e3 if seconds else math.nan


IN_README = {"llamacpp": "llama.cpp", "edgeprompt": "edgeprompt"}
"""Peers of the README's table, which both keep the blocks of a file; docs/benchmarks.md has all."""
README_MEASURES = (0, 3, 4, 5)
"""Columns of the README's table: places in MEASURES."""

REFERENCE = "reference"
"""Peers that compute what the weights of the file say, in float32: the others are compared with them."""
PEER, OTHERS = "llama.cpp, the file itself", "kl-120-sentences.json"
KL_OF = {
    "edgeprompt": "gguf",
    "edgeprompt-int4-128": "int4-128",
    "edgeprompt-int8": "int8",
    "llamacpp": PEER,
    "genai": "onnxruntime-genai, int4",
    "genai-pruned": "onnxruntime-genai, int4",
    "pytorch": REFERENCE,
}
"""Which figure of `benchmarks.quality.kl` a peer has; the others were not measured."""
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


def divergences(base: str, folder: Path = RESULTS) -> Divergences:
    """What was measured of a base: from kl.json, and from an earlier run what is missing there."""
    found = Divergences()
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
        return "The KL divergence was not measured: the weights are random. edgeprompt has the file's own blocks."
    earlier = " ~: of an earlier run on 120 sentences, rounded." if any(one.earlier for one in kl.values()) else ""
    return (
        "KL: mean divergence of the next token from the weights of the file in float32. *Faithful* has at most "
        f"{MOST_KL} times llama.cpp's; *fast* computes something else, which a prompt must be tuned for.{earlier}"
    )


def undisturbed(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the rounds of every peer during which cores stayed together, or all where none did."""
    measured = [one for peer in result["peers"].values() for one in peer["rounds"]]
    trips = [trip for one in measured for trip in one.get("core_round_trip_ns", ()) if trip is not None]
    limit = APART * min(trips, default=0)

    def kept(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one for one in made if max(one.get("core_round_trip_ns") or [0]) <= limit] or made

    peers = {name: {**peer, "rounds": kept(peer["rounds"])} for name, peer in result["peers"].items()}
    return {**result, "peers": peers}


def to_markdown(result: dict[str, Any], kl: Divergences | None = None) -> str:
    """Medians of rounds, and where and how it was measured."""
    kl = kl or {}
    rounds, rows = max(len(peer["rounds"]) for peer in result["peers"].values()), list[tuple[str, str]]()
    result = undisturbed(result)
    for name, peer in result["peers"].items():
        cells = _medians(peer["rounds"]) if peer["rounds"] else ["absent"] * len(MEASURES)
        rows.append((name, f"| {peer['title']} | {_kl(name, kl)} | " + " | ".join(cells) + " |"))
    return "\n".join([*HEAD, *_grouped(rows, kl), "", _explained(kl), "", *_notes(result, rounds)]) + "\n"


def summary_to_markdown(results: list[dict[str, Any]]) -> str:
    """The README's table: of each base, the two runtimes that keep the blocks of its file."""
    titles = ["base", "runtime", "KL", *(MEASURES[place][0] for place in README_MEASURES)]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for result in map(undisturbed, results):
        kl = divergences(result["base"])
        for name, title in IN_README.items():
            peer = result["peers"].get(name)
            if peer is not None and peer["rounds"]:
                medians = _medians(peer["rounds"])
                cells = [result["model"], title, _kl(name, kl), *(medians[place] for place in README_MEASURES)]
                lines.append(f"| {' | '.join(cells)} |")
    device, first = results[0]["device"], results[0]
    lines += [
        "",
        "KL: mean KL divergence of the next-token distributions from those of the file's weights in float32. A base "
        "with random weights has no KL. RSS: resident memory.",
        f"{first['threads']} threads. The keys and values of a 16-token prompt are already in memory. "
        f"{device['cpu']} ({', '.join(device['isa'])}), {first['time'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def _medians(rounds: list[dict[str, Any]]) -> list[str]:
    return [_shown(statistics.median(value(one) for one in rounds)) for _, value, _ in MEASURES]


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


def _twin(other: str, name: str) -> bool:
    """Whether the pair has stood in the first table of ratios already."""
    return name != "edgeprompt" and other.startswith("edgeprompt")


def _notes(result: dict[str, Any], rounds: int) -> list[str]:
    device, peers = result["device"], result["peers"]
    notes = [
        f"{result['model']}. {result['threads']} threads, one sequence at a time, 16-token prompt, "
        f"{result['new_tokens']} new tokens. Each peer classifies {result['snippets']} review snippets, as many at "
        "once as suits it best; edgeprompt has a worker for each thread. "
        f"{rounds} rounds in turn, every measurement in a process of its own. A measurement during which the host "
        f"moved the cores apart was {_repeated(result.get('tries', 3))}; it is left out where the peer has others. "
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


def _repeated(tries: int) -> str:
    return f"made again, up to {tries} times" if tries > 1 else "not made again"


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


def result_of(base: str) -> Path:
    """The result of a base."""
    return RESULTS / f"peers-{base}.json"


def write_table(document: Path, table: str, name: str = "benchmarks") -> None:
    """Put a table between a document's markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document.name} lacks the markers {begin} and {end}")
    document.write_text(f"{before}{begin}\n\n{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Write the tables of all results that are there."""
    files = [result_of(base.name) for base in BASES]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    if not results:
        raise SystemExit(f"no comparison with peers in {RESULTS.name}/; run python -m benchmarks")
    write_table(ROOT / "README.md", summary_to_markdown(results))
    parts = []
    for result in results:
        kl = divergences(result["base"])
        parts += [f"### {result['model']}\n", to_markdown(result, kl), ratios_to_markdown(result, kl)]
    write_table(ROOT / "docs/benchmarks.md", "\n".join(parts))


if __name__ == "__main__":
    main()
