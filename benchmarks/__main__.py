"""`python -m benchmarks`: build every peer's environment, run all on the same work, print ratios, keep the figures."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.bases import BASES, FILE, Base
from benchmarks.peers.environments import PEERS, Peer
from benchmarks.peers.table import ROOT, divergences, ratios_to_markdown, result_of, to_markdown
from edgeprompt.cli.console import note


@click.command()
@click.option("--base", "bases", multiple=True, type=click.Choice([base.name for base in BASES]), help="Only these.")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--peer", "peers", multiple=True, type=click.Choice([peer.name for peer in PEERS]), help="Only these.")
@click.option("--python", "pythons", multiple=True, metavar="PEER=PATH", help="Use this interpreter for a peer.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "work/bench", show_default=False)
@click.option(
    "--tries",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Of one measurement, at most, for one during which the host keeps the cores together.",
)
@click.option("--quick", is_flag=True, help="A few samples of everything, to see that it works; keeps no result.")
def main(
    bases: tuple[str, ...],
    rounds: int,
    threads: int,
    peers: tuple[str, ...],
    pythons: tuple[str, ...],
    folder: Path,
    tries: int,
    quick: bool,
) -> None:
    """Compare edgeprompt with its peers, side by side and in turn.

    Results go to benchmarks/results/peers-BASE.json, after every round.
    """
    given = {name: Path(path) for name, _, path in (item.partition("=") for item in pythons)}
    chosen = tuple(peer for peer in PEERS if not peers or peer.name in (*peers, "edgeprompt"))
    for base in BASES:
        if not bases or base.name in bases:
            _compare(base, folder.absolute(), chosen, given, rounds=rounds, threads=threads, tries=tries, quick=quick)


def _compare(
    base: Base,
    folder: Path,
    chosen: tuple[Peer, ...],
    given: dict[str, Path],
    *,
    rounds: int,
    threads: int,
    tries: int,
    quick: bool,
) -> None:
    from benchmarks.peers.prepare import prepare
    from benchmarks.peers.rounds import run_rounds
    from edgeprompt.bench.device import clock, describe_device, throttling
    from edgeprompt.package.files import write_atomic
    from edgeprompt.package.folder import open_package
    from edgeprompt.package.outputs import TEXT

    note(f"{base.title}: models and texts")
    work = prepare(folder / base.name, base, threads=threads)
    before = clock()
    package = open_package(folder / base.name / FILE)
    graph = package.manifest.graphs["model"]
    facts = {
        "format": "edgeprompt-peers",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base.name,
        "model": base.title,
        "threads": threads,
        "new_tokens": base.new_tokens,
        "snippets": base.snippets,
        "tries": tries,
        "device": describe_device(),
        "weight_bytes": sum((package.path / name).stat().st_size for name in graph.data),
    }
    result: dict[str, Any] = {}

    def keep(measured: dict[str, Any]) -> None:
        result.update({**facts, "throttling": throttling(before, clock()), **measured})
        if not quick:
            write_atomic(result_of(base.name), (json.dumps(result, indent=1) + "\n").encode(), TEXT)

    run_rounds(
        work,
        rounds=rounds,
        chosen=chosen,
        pythons=given,
        environments=folder / "environments",
        threads=threads,
        tries=tries,
        quick=quick,
        tell=note,
        keep=keep,
    )
    kl = divergences(base.name)
    for part in (to_markdown, ratios_to_markdown):
        click.echo(part(result, kl))


if __name__ == "__main__":
    main()
