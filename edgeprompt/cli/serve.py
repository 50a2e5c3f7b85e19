"""`edgeprompt serve`: a package and its prompts over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from edgeprompt.cli import console, serving

KEY_VARIABLE = "EDGEPROMPT_API_KEY"


@click.command("serve")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of prompt files, served by their names. Files may be added, replaced and removed while the server "
    "runs. May be repeated.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address. All but loopback need a key.")
@click.option("--port", type=console.Whole(0, 65535), default=8080, show_default=True, help="0: any free port.")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="Clients must send this key. Other users of this machine can see command lines, so prefer --api-key-file or "
    f"the variable {KEY_VARIABLE}. May be repeated.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File of keys, one per line.")
@click.option("--allow-unauthenticated", is_flag=True, help="Need no key, whatever --host is.")
@click.option(
    "--grace",
    type=console.Number(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that requests in flight have after SIGTERM, before they are cancelled.",
)
@click.option(
    "--timeout",
    type=console.Number(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that a request may take, queueing included.",
)
@click.option("--max-queue", type=console.Whole(min=1), default=1024, show_default=True, help="Most waiting requests.")
@click.option("--max-streams", type=console.Whole(min=1), default=64, show_default=True, help="Most open streams.")
@click.option("--max-connections", type=console.Whole(min=1), default=512, show_default=True)
@click.option("--max-body", type=console.Whole(min=1), default=4 << 20, show_default=True, help="Bytes of a request.")
@click.option("--max-text", type=console.Whole(min=1), default=100_000, show_default=True, help="Characters of a text.")
@click.option("--max-inputs", type=console.Whole(min=1), default=256, show_default=True, help="Texts of a request.")
@click.option("--log-texts", is_flag=True, help="Also log the texts of requests and answers.")
@serving.session_options
def command(
    package: Path,
    folders: tuple[Path, ...],
    keys: tuple[str, ...],
    api_key_file: Path | None,
    max_queue: int,
    **values: Any,
) -> None:
    """Serve PACKAGE over HTTP with OpenAI's API.

    The base and every prompt are models. The paths are /v1/completions, /v1/chat/completions, /v1/embeddings,
    /v1/classify, /v1/tag, /v1/answer, /v1/models, /health, /metrics and /openapi.json. Requests of different prompts
    share one scheduler. The log is one JSON object per line on stderr.
    """
    from edgeprompt.server.log import Log, forward
    from edgeprompt.server.options import ServerOptions
    from edgeprompt.server.process import Server, import_server, open_socket

    import_server()
    session: Any = {name: values.pop(name) for name in serving.SessionOptions.__annotations__}
    limits = dict(values, max_inputs=min(values["max_inputs"], max_queue))
    options = ServerOptions(api_keys=_keys(keys, api_key_file), **limits)
    if keys:
        console.note(f"note: a key on the command line shows in the list of processes; use {KEY_VARIABLE} or a file")
    with (
        open_socket(options) as bound,
        serving.open_runtime(package, max_queue=max_queue, **session) as runtime,
    ):
        for folder in folders:
            runtime.add_folder(folder)

        log = Log(texts=options.log_texts)
        forward(log)

        def ready(url: str) -> None:
            log.write("listening", url=url, package=str(package), prompts=len(runtime.prompts))
            console.note(f"serving {runtime.manifest.base.name} on {url}/v1; Ctrl-C stops")

        Server(runtime, options, bound, log=log, ready=ready).run()


def _keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """All keys: of the command line, the environment and a file."""
    from edgeprompt.errors import InputError
    from edgeprompt.package.files import read_regular

    found = [*given]
    if KEY_VARIABLE in os.environ:
        found.append(os.environ[KEY_VARIABLE])
    if file is not None:
        lines = read_regular(file, 1 << 20).decode("utf-8", "replace").splitlines()
        inside = [line.strip() for line in lines if line.strip()]
        if not inside:
            raise InputError(f"{str(file)!r} holds no key; write one a line")
        found += inside
    return tuple(found)
