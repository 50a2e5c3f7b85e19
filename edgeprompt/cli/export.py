"""`edgeprompt export`: from a base model to a validated package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprompt import names
from edgeprompt.cli import console

if TYPE_CHECKING:
    from edgeprompt.package.manifest import Manifest


@click.command("export")
@click.argument("base")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder of the package.")
@click.option(
    "--precision",
    type=click.Choice((*names.PRECISIONS, "auto")),
    help="Default: gguf for a .gguf file (each matrix in 4 or 8 bits, as the file has it), else fp32. auto: export "
    "fp32, int8 (cuda: fp16) and int4 in two block sizes, and keep what serves --prompt fastest on this device.",
)
@click.option(
    "--data",
    metavar="DATA",
    help="Texts on which the package is compared with its base, instead of the shipped ones: records with a column "
    "text, or lines of a .txt file. For --precision auto: labelled records on which the prompts are evaluated.",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help="Texts as for --data that show which activations of a decoder matter (int8, int4), instead of the shipped "
    "ones. --data must hold others.",
)
@click.option(
    "--allow-quality-loss",
    is_flag=True,
    help="Write the package even if it is too far from BASE; its manifest says so.",
)
@click.option(
    "--tolerance",
    type=console.Number(min=0),
    default=1.0,
    show_default=True,
    help="For --precision auto: most points of the metric that a prompt may lose against fp32.",
)
@click.option(
    "--route",
    type=click.Choice(("auto", *names.ROUTES)),
    default="auto",
    show_default=True,
    help="genai: ORT GenAI's model builder; torch: torch.onnx; onnx: BASE is a folder of graphs that others exported.",
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in names.BLOCK_SIZES]),
    default="32",
    show_default=True,
    help="For int4: 32 keeps the base's weights best; 64 and 128 decode faster (tune prompts --for the package).",
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
    "--target",
    type=click.Choice(names.TARGETS),
    default=names.NATIVE,
    show_default=True,
    help="web: operators that are fast in browsers too (int8 unless --precision says fp32 or fp16), weights in files "
    "of at most 64 MB.",
)
@click.option(
    "--layout",
    type=click.Choice(("edgeprompt", "hub")),
    default="edgeprompt",
    show_default=True,
    help="hub: also the files that transformers.js knows, as onnx/model_quantized.onnx and config.json (decoders).",
)
@click.option(
    "--prompt-input",
    type=click.Choice(("required", "optional")),
    default="required",
    show_default=True,
    help="Whether prompt_embeddings must be fed: required for ORT GenAI, optional for stock ORT's adapters.",
)
@click.option("--door", type=click.Choice(("input", "adapter")), hidden=True, help="Old name of --prompt-input.")
@click.option(
    "--allow-other-weights",
    is_flag=True,
    help="Put prompts in that were tuned for weights too far from the package's.",
)
@click.option("--against", help="If BASE is a folder of graphs: the base in PyTorch to compare with.")
@click.option("--force", is_flag=True, help="Replace an older package at OUTPUT, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as one JSON object.")
def command(
    base: str,
    out: Path,
    precision: str | None,
    data: str | None,
    calibration: str | None,
    allow_quality_loss: bool,
    tolerance: float,
    route: str,
    block_size: str,
    provider: str,
    prompts: tuple[Path, ...],
    target: str,
    layout: str,
    prompt_input: str,
    door: str | None,
    allow_other_weights: bool,
    against: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export BASE to one validated ONNX graph with a prompt input.

    BASE is a Hugging Face id, a local folder or a .gguf file. If the graph does not compute what BASE computes, nothing
    is written.
    """
    choosing = precision == "auto"
    if choosing and (data is None or not prompts):
        raise click.UsageError("--precision auto, --data and at least one --prompt go together")
    if choosing and (target != names.NATIVE or layout != "edgeprompt"):
        raise click.UsageError("--precision auto measures packages for this machine; give --target web a precision")
    if precision != "int4" and block_size != "32":
        raise click.UsageError("--block-size goes with --precision int4")
    if choosing and against is not None:
        raise click.UsageError("--against is for graphs that others exported, whose precision is not chosen here")
    if door is not None:
        prompt_input = {"input": "required", "adapter": "optional"}[door]
        console.note(f"--door {door} is now --prompt-input {prompt_input}; the old name is removed in the next version")
    console.quiet_libraries()
    from exporters import export_best, export_model

    with console.stages("export") as tell:
        shared: dict[str, Any] = {
            "route": route, "provider": provider, "prompts": prompts, "force": force,
            "prompt_input": prompt_input, "progress": tell, "data": data, "calibration": calibration,
            "allow_quality_loss": allow_quality_loss,
        }  # fmt: skip
        if choosing:
            report = export_best(base, out, tolerance=tolerance, **shared)
        else:
            report = export_model(
                base, out, precision=precision, block_size=int(block_size), against=against,
                allow_other_weights=allow_other_weights, target=target, layout=layout, **shared,
            )  # fmt: skip
    if reason := report.manifest.extra.get("route_instead_of_genai"):
        console.note(f"note: exported by the torch route: {reason}")
    for line in report.manifest.extra.get("generation_notes", ()):
        console.note(f"note: generation_config: {line}")
    choice = report.manifest.extra.get("precision_choice")
    tell_quality(report.manifest, report.manifest.quality)
    if as_json:
        facts = {
            "path": str(report.path),
            "size_bytes": report.size_bytes,
            "route": report.manifest.route,
            "precision": report.manifest.precision,
            "target": report.manifest.target,
            "validation": report.validation,
            "quality": report.manifest.quality,
            "quality_gate": report.manifest.quality_gate,
            **({"precision_choice": choice} if choice else {}),
        }
        click.echo(console.as_json(facts))
        return
    if choice:
        show_choice(choice)
    click.echo(f"{report.path}: {report.size_bytes / 1e6:.1f} MB, {report.manifest.precision}, {report.manifest.route}")
    console.print_measured({**report.validation, "quality": report.manifest.quality})


def tell_quality(manifest: Manifest, quality: Mapping[str, Any]) -> None:
    """One line on stderr: what the package keeps of its base, and what to do where that is little."""
    from exporters.validate.quality import in_words, warning

    if quality:
        warned = warning(quality, manifest)
        console.note(f"warning: {warned}" if warned else f"{manifest.precision} {in_words(quality)}")


def show_choice(choice: Mapping[str, Any]) -> None:
    """The candidates of `--precision auto` as a table on stdout."""
    metric = f"metric ({choice['rows']} rows)"
    rows = [("precision", "MB", "first ms", f"ms a {choice['cost']}", metric, "next tokens kept", "KL", "verdict")]
    for found in choice["candidates"]:
        scores = (
            f"{name}: {100 * score['value']:.1f} ± {100 * score['standard_error']:.1f}"
            for name, score in found.get("scores", {}).items()
        )
        quality = found.get("quality", {})
        kept = (f"{100 * quality['top1']:.0f} %", f"{quality['kl_mean']:.3g}") if "top1" in quality else ("", "")
        figures = (
            f"{found['size_bytes'] / 1e6:.1f}", f"{found['first_ms']:.2f}", f"{found['cost_ms']:.2f}",
            ", ".join(scores), *kept,
        ) if "cost_ms" in found else ("", "", "", "", *kept)  # fmt: skip
        block = f", blocks of {found['block_size']}" if "block_size" in found else ""
        rows.append((f"{found['precision']}{block}", *figures, found["verdict"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
