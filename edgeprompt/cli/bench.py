"""`edgeprompt bench`: latency, throughput and memory of a package on this device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeprompt.cli import console

FORMATS = ("md", "csv", "json", "jsonl", "html")


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """A comma-separated list of whole numbers from 1, without repeats."""
    if value is None:
        return None
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is no list of whole numbers from 1, like 1,4,16", ctx, param)
    return numbers


@click.command("bench")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Soft prompt; may be repeated. Default: the prompts of the package, else a random one.",
)
@click.option(
    "--input-tokens",
    callback=_numbers,
    metavar="N,N,...",
    default="32,128",
    show_default=True,
    help="Lengths of the text.",
)
@click.option("--new-tokens", type=console.Whole(min=2), default=64, show_default=True)
@click.option(
    "--batch", callback=_numbers, metavar="N,N,...", default="1,4", show_default=True, help="Sequences in one call."
)
@click.option(
    "--tasks",
    callback=_numbers,
    metavar="N,N,...",
    default="1,10,100,1000",
    show_default=True,
    help="Numbers of loaded prompts, for the memory test.",
)
@click.option(
    "--threads", callback=_numbers, metavar="N,N,...", help="intra_op_num_threads. Default: one per physical core."
)
@click.option("--provider", default="auto", show_default=True, metavar="NAME,...", help="cpu, cuda, auto.")
@click.option("--repetitions", type=console.Whole(min=1), default=5, show_default=True)
@click.option("--warmup", type=console.Whole(min=0), default=1, show_default=True)
@click.option("--format", "kind", type=click.Choice(FORMATS), default="md", show_default=True)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write to this file instead of stdout."
)
@click.option("--force", is_flag=True, help="Replace an output that edgeprompt bench did not write.")
@click.option(
    "--compare",
    "old",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="OLD.json",
    help="Also print ratios to an older result (of --format json), and which differ beyond noise.",
)
def command(
    package: Path,
    prompts: tuple[Path, ...],
    input_tokens: tuple[int, ...],
    new_tokens: int,
    batch: tuple[int, ...],
    tasks: tuple[int, ...],
    threads: tuple[int, ...] | None,
    provider: str,
    repetitions: int,
    warmup: int,
    kind: str,
    output: Path | None,
    force: bool,
    old: Path | None,
) -> None:
    """Measure PACKAGE on this device: cold start, time to first token, tokens/s, classification, memory, energy."""
    from edgeprompt.bench import BenchOptions, compare, load_report, run_bench
    from edgeprompt.bench.statistics import require_scipy
    from edgeprompt.package.files import write_atomic
    from edgeprompt.package.outputs import REPORT, check_output

    if output is None:
        console.need_stdout()
    write = _writer(kind)
    sources = (package, old, *prompts)
    if output is not None:
        check_output(output, REPORT, force=force, sources=sources)
    before = load_report(old) if old else None  # before minutes of work
    if before is not None:
        require_scipy()
    options = BenchOptions(
        prompts=prompts,
        input_tokens=input_tokens,
        new_tokens=new_tokens,
        batch=batch,
        tasks=tasks,
        threads=threads or (None,),
        providers=tuple(provider.split(",")),
        repetitions=repetitions,
        warmup=warmup,
    )
    with console.stages("bench") as tell:
        report = run_bench(package, options, progress=tell)
    text = write(report)
    if output is not None:
        write_atomic(output, text.encode(), REPORT, force=force, sources=sources)
    else:
        click.echo(text, nl=False)
    if before is not None:
        # Beside a format for machines the comparison must not spoil stdout.
        click.echo(compare(report, before), nl=False, err=output is None and kind != "md")


def _writer(kind: str) -> Callable[[Any], str]:
    """What writes a format; a missing library is told here, before minutes of work."""
    from edgeprompt.bench.report import TEXT_FORMATS

    if kind != "html":
        return TEXT_FORMATS[kind]
    from edgeprompt.bench.page import to_html
    from edgeprompt.bench.plots import require_matplotlib

    require_matplotlib()
    return to_html
