"""`edgeprompt validate`: prove an existing package against its base."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeprompt.cli import console


@click.command("validate")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--against", "base", required=True, help="The base: Hugging Face id, local folder or .gguf file.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Prompt file to compare with as well; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="What was measured, as one JSON object.")
def command(package: Path, base: str, prompts: tuple[Path, ...], as_json: bool) -> None:
    """Check PACKAGE's files and compare it with its base in PyTorch."""
    console.quiet_libraries()
    from exporters import validate_package

    with console.stages("validate") as tell:
        tell("compare", 0.0)
        measured = validate_package(package, against=base, prompts=prompts)
    if as_json:
        click.echo(json.dumps(dict(measured), ensure_ascii=False))
        return
    click.echo(f"{package}: valid")
    console.print_measured(measured)
