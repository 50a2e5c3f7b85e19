"""`edgeprompt export`: from a base model to a validated package."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeprompt import names
from edgeprompt.cli import console


@click.command("export")
@click.argument("base")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder of the package.")
@click.option("--precision", type=click.Choice(names.PRECISIONS), default="fp32", show_default=True)
@click.option(
    "--route",
    type=click.Choice(("auto", *names.ROUTES)),
    default="auto",
    show_default=True,
    help="genai: its graph builder; torch: torch.onnx; onnx: BASE is a folder of graphs that others exported.",
)
@click.option("--provider", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Prompt file to validate with and to put into the package; may be repeated.",
)
@click.option(
    "--door",
    type=click.Choice(("input", "adapter")),
    default="input",
    show_default=True,
    help="input: prompt_embeddings is a required input (ORT GenAI); adapter: optional, for stock ORT adapters.",
)
@click.option("--against", help="The base in PyTorch to compare with, where BASE is a folder of graphs.")
@click.option("--force", is_flag=True, help="Replace OUTPUT, once the new package is whole.")
@click.option("--json", "as_json", is_flag=True, help="What was measured, as one JSON object.")
def command(
    base: str,
    out: Path,
    precision: str,
    route: str,
    provider: str,
    prompts: tuple[Path, ...],
    door: str,
    against: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export BASE to one validated ONNX graph with a prompt input.

    BASE is a Hugging Face id, a local folder or a .gguf file. A package that does not compute what its base computes
    is not written.
    """
    console.quiet_libraries()
    from exporters import export_model

    with console.stages("export") as tell:
        report = export_model(
            base,
            out,
            precision=precision,
            route=route,
            provider=provider,
            prompts=prompts,
            force=force,
            door=door,
            against=against,
            progress=tell,
        )
    if as_json:
        facts = {
            "path": str(report.path),
            "size_bytes": report.size_bytes,
            "route": report.manifest.route,
            "precision": report.manifest.precision,
            "validation": report.validation,
        }
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    click.echo(f"{report.path}: {report.size_bytes / 1e6:.1f} MB, {report.manifest.precision}, {report.manifest.route}")
    console.print_measured(report.validation)
