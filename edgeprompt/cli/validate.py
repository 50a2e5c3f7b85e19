"""`edgeprompt validate`: prove an existing package against its base."""

from __future__ import annotations

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
    help="Prompt file to compare with as well, and whose golden example is checked; may be repeated.",
)
@click.option(
    "--data", metavar="DATA", help="Texts to compare on: records with a column text, or lines of a .txt file."
)
@click.option("--allow-quality-loss", is_flag=True, help="Accept a package that is too far from its base.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as one JSON object.")
def command(
    package: Path, base: str, prompts: tuple[Path, ...], data: str | None, allow_quality_loss: bool, as_json: bool
) -> None:
    """Check PACKAGE's files, compare it with its base in PyTorch, and check its prompts' golden examples."""
    console.need_stdout()
    console.quiet_libraries()
    from edgeprompt.cli.export import tell_quality
    from edgeprompt.loading import load
    from edgeprompt.package.folder import open_package
    from edgeprompt.prompts.golden import check_all
    from exporters import validate_package

    with console.stages("validate") as tell:
        measured = dict(
            validate_package(
                package, against=base, prompts=prompts, data=data, allow_quality_loss=allow_quality_loss, progress=tell
            )
        )
        tell("golden examples", 0.9)
        with load(package, provider="cpu", prompts=prompts) as runtime:
            golden = check_all(runtime)
    if golden:
        measured["golden"] = {name: check.max_logit_difference for name, check in golden.items()}
    tell_quality(open_package(package).manifest, measured["quality"])
    if as_json:
        click.echo(console.as_json(measured))
        return
    click.echo(f"{package}: valid")
    console.print_measured(measured)
