"""`edgeprompt push`: a package or a prompt file to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprompt.cli import console


@click.command("push")
@click.argument("source", metavar="PACKAGE|PROMPT", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, where it is a new one.")
@click.option("--license", "licence", metavar="ID", help="The base's licence, as the Hub names it: apache-2.0.")
@click.option("--message", help="Of the commit.")
def command(source: Path, repo: str, private: bool, licence: str | None, message: str | None) -> None:
    """Put a package or a prompt file into REPO (user/repo) on the Hugging Face Hub.

    A model card is written from the files: what it is, its base and fingerprint, precision and measured quality,
    labels, and how to use it. A card that edgeprompt did not write is left as it is. The token is that of `hf auth
    login`, or HF_TOKEN.
    """
    console.quiet_libraries()
    from edgeprompt.publish import push

    click.echo(push(source, repo, private=private, licence=licence, message=message))
