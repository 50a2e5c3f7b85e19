"""How far each precision is from its base, beside llama.cpp on the same file: KL divergence, top-1, perplexity.

    python -m benchmarks.quality.kl --llamacpp PYTHON [--bases smollm2,gemma3] [--sentences 400] [--table]

PyTorch in float32 on the weights of the GGUF file is the reference. Two places of every sentence are predicted: its
middle and its end. The sentences are those of the test sets in examples/data, filled up from the training set of the
source task: no default was chosen by them. PYTHON is an interpreter that has xllamacpp. llama.cpp gives its 2,000 most
likely tokens; the others count as one token there, which can only make its KL divergence look smaller, and share the
rest evenly for its perplexity, which is rough. Writes benchmarks/results/kl.json; `--table` prints it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe, line

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import GEMMA3, SMOLLM2, Model, model_file, package  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "kl.json"
BASES = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
PRECISIONS = ("gguf", "int8", "int4")
LLAMACPP = "llama.cpp, the file itself"
MOST = 2000
_AT_ONCE = 32
_LEAST_TOKENS, _MOST_TOKENS = 6, 64

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamacpp", type=Path, metavar="PYTHON")
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--add", action="store_true", help="Keep the result's other rows, of the same sentences.")
    parser.add_argument("--table", action="store_true", help="Measure nothing, print the result.")
    given = parser.parse_args()
    if not given.table:
        result: dict[str, Any] = {"sentences": given.sentences, "bases": {}}
        if given.add:
            result = json.loads(given.out.read_text("utf-8"))
            if result["sentences"] != given.sentences:
                raise SystemExit(f"the result has {result['sentences']} sentences; give as many, or leave out --add")
        result["machine"] = describe()
        for name in given.bases.split(","):
            found = measure(BASES[name], given.precisions.split(","), given.sentences, given.llamacpp, given.threads)
            result["bases"][name] = {**result["bases"].get(name, {}), **found}
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(given.out.read_text("utf-8"))))


def sentences(count: int) -> list[str]:
    """Texts of the test sets, then of the source task's training set, `count` in all."""
    folder = ROOT / "examples" / "data"
    texts: list[str] = []
    for file in (*sorted(folder.glob("*.test.csv")), folder / "source.train.csv"):
        with file.open(encoding="utf-8", newline="") as opened:
            texts += [row["text"] for row in csv.DictReader(opened)]
    return list(dict.fromkeys(texts))[:count]


def measure(
    model: Model, precisions: list[str], count: int, llamacpp: Path | None, threads: int
) -> dict[str, dict[str, Any]]:
    """Figures of every precision of one base, and of llama.cpp."""
    import torch

    from edgeprompt.base.decoder_graph import DecoderGraph
    from edgeprompt.base.load import load_base
    from edgeprompt.package.folder import open_package
    from exporters.validate.reference import Question, ask

    torch.set_num_threads(threads)
    packages = {name: open_package(package(name, model)) for name in precisions}
    loaded = load_base(model_file(model))
    vocab = loaded.config.get_text_config().vocab_size
    texts = [np.array(loaded.tokenizer.encode(text)[:_MOST_TOKENS], np.int64) for text in sentences(count + 100)]
    texts = [ids for ids in texts if len(ids) >= _LEAST_TOKENS][:count]
    graphs = {name: DecoderGraph(found.path, found.manifest) for name, found in packages.items()}
    rows = np.zeros((1, loaded.config.get_text_config().hidden_size), np.float32)
    tallies: dict[str, list[list[float]]] = {name: [] for name in (*precisions, LLAMACPP)}
    peer = _Peer(llamacpp, model_file(model), threads) if llamacpp is not None else None
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        said = ask(loaded.model, [Question(ids, [at - 1 for at in _places(ids)]) for ids in part], vocab)
        for ids, answer in zip(part, said, strict=True):
            wanted = [_log_softmax(row) for row in answer.logits]
            for name, graph in graphs.items():
                for at, want, got in zip(_places(ids), wanted, _logits(graph, ids, rows), strict=True):
                    tallies[name].append(_compare(want, _log_softmax(got[:vocab]), int(ids[at])))
            if peer is not None:
                for at, want in zip(_places(ids), wanted, strict=True):
                    tallies[LLAMACPP].append(peer.compare(want, ids[:at], int(ids[at])))
        print(f"{model.name}: {start + len(part)} of {len(texts)} sentences", file=sys.stderr, flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name, tally in tallies.items():
        if tally:
            size = packages[name].path if name in packages else None
            found[name] = {
                **_figures(np.array(tally)),
                "bytes": sum(file.stat().st_size for file in size.rglob("*") if file.is_file())
                if size is not None
                else model_file(model).stat().st_size,
            }
    return found


def _places(ids: Ids) -> tuple[int, int]:
    """Which tokens are predicted: one in the middle, and the last."""
    return len(ids) // 2, len(ids) - 1


def _logits(graph: Any, ids: Ids, rows: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    past, fed = graph.empty_past(), 0
    for at in _places(ids):
        logits, past = graph.run(ids[None, fed:at], np.ones((1, at), np.int64), past, rows)
        fed = at
        yield logits[0]


def _log_softmax(logits: npt.NDArray[Any]) -> Floats:
    shifted: Floats = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def _compare(want: Floats, got: Floats, token: int) -> list[float]:
    return [
        float((np.exp(want) * (want - got)).sum()), float(want.argmax() == got.argmax()), -float(got[token]),
        -float(want[token]),
    ]  # fmt: skip


def _figures(tally: Floats) -> dict[str, Any]:
    divergence, same, loss, base = tally.T
    return {
        "places": len(tally),
        "kl_mean": float(divergence.mean()),
        "kl_median": float(np.median(divergence)),
        "kl_p90": float(np.quantile(divergence, 0.9)),
        "top1": float(same.mean()),
        "perplexity": float(np.exp(loss.mean())),
        "perplexity_base": float(np.exp(base.mean())),
    }


class _Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, gguf: Path, threads: int) -> None:
        script = Path(__file__).with_name("llamacpp_logits.py")
        self._process = subprocess.Popen(
            [python, script, gguf, str(MOST), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise SystemExit("llama.cpp ended; does the interpreter of --llamacpp have xllamacpp?")
        return json.loads(text)

    def compare(self, want: Floats, ids: Ids, token: int) -> list[float]:
        """As `_compare`, over its most likely tokens and one that stands for all others."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(ids.tolist()) + "\n")
        self._process.stdin.flush()
        pairs = self._read()
        named, got = np.array([one[0] for one in pairs]), np.array([one[1] for one in pairs])
        others = np.ones(len(want), bool)
        others[named] = False
        rest = max(1 - float(np.exp(got).sum()), 1e-9)
        want_rest = float(np.exp(want[others]).sum())
        divergence = float((np.exp(want[named]) * (want[named] - got)).sum())
        divergence += want_rest * (np.log(max(want_rest, 1e-30)) - np.log(rest))
        place = np.flatnonzero(named == token)
        loss = -float(got[place[0]]) if len(place) else -np.log(rest / max(1, int(others.sum())))
        return [divergence, float(named[got.argmax()] == want.argmax()), float(loss), -float(want[token])]


def table(result: dict[str, Any]) -> str:
    """Markdown, as docs/quantisation.md has it."""
    lines = [
        "| base | | MB | mean KL | median | 90th percentile | top-1 | perplexity (base) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {base} | {name} | {row['bytes'] / 1e6:.0f} | {row['kl_mean']:.4f} | {row['kl_median']:.4f} "
        f"| {row['kl_p90']:.4f} | {100 * row['top1']:.1f} % | {row['perplexity']:.2f} ({row['perplexity_base']:.2f}) |"
        for base, rows in result["bases"].items()
        for name, row in rows.items()
    ]
    return "\n".join([*lines, "", f"{result['sentences']} sentences, two places each. {line(result['machine'])}"])


if __name__ == "__main__":
    main()
