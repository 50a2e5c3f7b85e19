"""How far each precision is from its base, beside llama.cpp on the same file: KL divergence, top-1, perplexity.

    python -m benchmarks.quality.kl --llamacpp PYTHON [--floats FOLDER] [--bases smollm2,gemma3] [--table]

PyTorch in float32 on the weights of the GGUF file is the reference. `--floats` compares int4 of the same bases as
floats (`float_bases.py`) with llama.cpp's Q4_K_M of them, made with its libraries in FOLDER (`llamacpp_quantize.py`),
and with what ONNX Runtime GenAI's builder makes in int4 by default; the floats are the reference then. Two places of
every sentence are predicted: its middle and its end. The sentences are those of the test sets in examples/data, filled
up from the training set of the source task: no default was chosen by them. PYTHON is an interpreter that has xllamacpp.
llama.cpp gives its 2,000 most likely tokens; the others count as one token there, which can only make its KL divergence
look smaller, and share the rest evenly for its perplexity, which is rough. Writes benchmarks/results/kl.json and
the table of docs/quantisation.md; `--table` only the latter.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe, line
from benchmarks.peers.table import write_table
from benchmarks.quality.float_bases import float_base, genai_int4, q4_k_m

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from models import GEMMA3, SMOLLM2, WORK, Model, edgeprompt, model_file, package  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "kl.json"
BASES = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
PRECISIONS = ("gguf", "int8", "int4")
LLAMACPP, Q4_K_M, GENAI = "llama.cpp, the file itself", "llama.cpp, Q4_K_M", "onnxruntime-genai, int4"
MOST = 2000
_AT_ONCE = 32
_LEAST_TOKENS, _MOST_TOKENS = 6, 64

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def main() -> None:
    """Measure, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamacpp", type=Path, metavar="PYTHON")
    parser.add_argument("--floats", type=Path, metavar="FOLDER")
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help='"": the file itself is not compared.')
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--add", action="store_true", help="Keep the result's other rows, of the same sentences.")
    parser.add_argument("--table", action="store_true", help="Measure nothing, write the table.")
    given = parser.parse_args()
    if not given.table:
        result: dict[str, Any] = {"sentences": given.sentences, "bases": {}}
        if given.add:
            result = json.loads(given.out.read_text("utf-8"))
            if result["sentences"] != given.sentences:
                raise SystemExit(f"the result has {result['sentences']} sentences; give as many, or leave out --add")
        machine = describe()
        result.setdefault("machine", machine)
        # Rows that are added on another machine say so; the table names them below.
        where = {} if result["machine"] == machine else {"machine": machine}
        for name in given.bases.split(","):
            for kind, compared in sides(
                BASES[name], [one for one in given.precisions.split(",") if one], given.llamacpp, given.floats
            ):
                found = measure(*compared, given.sentences, given.threads)
                rows = result.setdefault(kind, {})
                rows[name] = {**rows.get(name, {}), **{key: {**row, **where} for key, row in found.items()}}
                given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    found = table(json.loads(given.out.read_text("utf-8")))
    print(found)
    if given.out == OUT:
        write_table(ROOT / "docs" / "quantisation.md", found, "kl")


def sentences(count: int) -> list[str]:
    """Texts of the test sets, then of the source task's training set, `count` in all."""
    folder = ROOT / "examples" / "data"
    texts: list[str] = []
    for file in (*sorted(folder.glob("*.test.csv")), folder / "source.train.csv"):
        with file.open(encoding="utf-8", newline="") as opened:
            texts += [row["text"] for row in csv.DictReader(opened)]
    return list(dict.fromkeys(texts))[:count]


Compared = tuple[Path, dict[str, Path], dict[str, "Peer"]]
"""The reference, our packages, and peers."""


def sides(
    model: Model, precisions: list[str], llamacpp: Path | None, floats: Path | None
) -> Iterator[tuple[str, Compared]]:
    """What is compared: "bases", the file as it is, and "floats"."""
    packages = {name: package(name, model) for name in precisions}
    peers: dict[str, Peer] = {}
    if packages:
        if llamacpp is not None:
            peers[LLAMACPP] = _LlamaCpp(llamacpp, model_file(model))
        yield "bases", (model_file(model), packages, peers)
    if floats is None:
        return
    base, ours = float_base(model), WORK / f"{model.name}-f16-int4"
    if not ours.exists():
        edgeprompt("export", base, "-o", ours, "--precision", "int4", "--allow-quality-loss")
    peers = {Q4_K_M: _LlamaCpp(llamacpp, q4_k_m(model, floats))} if llamacpp is not None else {}
    if (genai := genai_int4(model)) is not None:
        peers[GENAI] = _GenAI(genai)
    yield "floats", (base, {"int4": ours}, peers)


def measure(
    reference: Path, packages: dict[str, Path], peers: dict[str, Peer], count: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Figures of every package and peer."""
    import torch

    from edgeprompt.base.decoder_graph import DecoderGraph
    from edgeprompt.base.load import load_base
    from edgeprompt.package.folder import open_package
    from exporters.validate.reference import Question, ask

    torch.set_num_threads(threads)
    loaded = load_base(reference)
    vocab = loaded.config.get_text_config().vocab_size
    texts = [np.array(loaded.tokenizer.encode(text)[:_MOST_TOKENS], np.int64) for text in sentences(count + 100)]
    texts = [ids for ids in texts if len(ids) >= _LEAST_TOKENS][:count]
    opened = {name: open_package(path) for name, path in packages.items()}
    graphs = {name: DecoderGraph(found.path, found.manifest) for name, found in opened.items()}
    rows = np.zeros((1, loaded.config.get_text_config().hidden_size), np.float32)
    tallies: dict[str, list[list[float]]] = {name: [] for name in (*packages, *peers)}
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        said = ask(loaded.model, [Question(ids, [at - 1 for at in _places(ids)]) for ids in part], vocab)
        for ids, answer in zip(part, said, strict=True):
            wanted = [_log_softmax(row) for row in answer.logits]
            for name, graph in graphs.items():
                for at, want, got in zip(_places(ids), wanted, _logits(graph, ids, rows), strict=True):
                    tallies[name].append(_compare(want, _log_softmax(got[:vocab]), int(ids[at])))
            for name, peer in peers.items():
                for at, want in zip(_places(ids), wanted, strict=True):
                    tallies[name].append(peer.compare(want, ids[:at], int(ids[at])))
        print(f"{reference.name}: {start + len(part)} of {len(texts)} sentences", file=sys.stderr, flush=True)
    sizes = {**packages, **{name: peer.path for name, peer in peers.items()}}
    return {name: {**_figures(np.array(tally)), "bytes": _size(sizes[name])} for name, tally in tallies.items()}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


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


class Peer(Protocol):
    """Somebody else's runtime on a file or folder."""

    path: Path

    def compare(self, want: Floats, ids: Ids, token: int) -> list[float]:
        """As `_compare`, of the token behind `ids`."""
        ...


class _GenAI:
    """ONNX Runtime GenAI."""

    def __init__(self, path: Path) -> None:
        import onnxruntime_genai

        self.path, self._library = path, onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(path))

    def compare(self, want: Floats, ids: Ids, token: int) -> list[float]:
        generator = self._library.Generator(self._model, self._library.GeneratorParams(self._model))
        generator.append_tokens(ids.astype(np.int32))
        logits = np.asarray(generator.get_output("logits"))[0, -1]
        return _compare(want, _log_softmax(logits[: len(want)]), token)


class _LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, gguf: Path) -> None:
        self.path = gguf
        script = Path(__file__).with_name("llamacpp_logits.py")
        self._process = subprocess.Popen(
            [python, script, gguf, str(MOST), "2"],
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
        """Over its most likely tokens, and one that stands for all others."""
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
    for kind in ("bases", "floats"):
        for base, rows in result.get(kind, {}).items():
            lines += [
                f"| {base}{' as floats' * (kind == 'floats')} | {name} | {row['bytes'] / 1e6:.0f} "
                f"| {row['kl_mean']:.4f} | {row['kl_median']:.4f} | {row['kl_p90']:.4f} | {100 * row['top1']:.1f} % "
                f"| {row['perplexity']:.2f} ({row['perplexity_base']:.2f}) |"
                for name, row in rows.items()
            ]
    lines += ["", f"{result['sentences']} sentences, two places each. {line(result['machine'])}"]
    others: dict[str, list[str]] = {}
    for kind in ("bases", "floats"):
        for base, rows in result.get(kind, {}).items():
            for name, row in rows.items():
                if "machine" in row:
                    others.setdefault(line(row["machine"]), []).append(f"{base} {name}")
    return "\n".join([*lines, *(f"Other rows ({', '.join(rows)}): {where}" for where, rows in others.items())])


if __name__ == "__main__":
    main()
