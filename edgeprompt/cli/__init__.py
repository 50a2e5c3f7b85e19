"""The command line: one file per command, imported when it is asked for.

A command's file exposes `command` (a click command) and imports nothing heavy at its top.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

import edgeprompt
from edgeprompt.errors import EdgePromptError, MissingDependencyError

COMMANDS = ("tune", "export", "convert", "run", "eval", "bench", "inspect", "validate")


class _Failed(click.ClickException):
    """The work failed: one line on stderr, exit code 1."""

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"error: {' '.join(self.message.split())}", file=file, err=file is None)


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C. CPython ends a process by the signal if a plain KeyboardInterrupt passed through `exec`, even one that
    was caught; dataclasses are made by `exec`, so that would depend on the moment."""


class _Commands(click.Group):
    """Commands by file name, loaded late, and the one place where errors become an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's file."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what edgeprompt or the operating system refuses is one line, any other exception is a bug."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has gone; click ends quietly
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _Failed(where + (error.strerror or str(error))) from error
        except EdgePromptError as error:
            raise _Failed(str(error)) from error
        except ModuleNotFoundError as error:
            raise _Failed(str(_missing(error))) from error
        except Exception as error:
            # Libraries written in Rust (tokenizers, safetensors) report a full disk as kinds of their own.
            if "(os error " not in str(error):
                raise
            raise _Failed(str(error)) from error


def _missing(error: ModuleNotFoundError) -> Exception:
    """What to say about a module that is not installed; one of our own is a bug."""
    if error.name is None or error.name.partition(".")[0] in ("edgeprompt", "exporters"):
        raise error
    return MissingDependencyError(
        f"this needs {error.name!r}, which is not installed: pip install 'edgeprompt[tune,export,eval]'"
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Let Ctrl-C and a polite kill (SIGTERM) unwind, so that half-written outputs are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        click.echo(f"error: stopped by {signal.Signals(number).name}", err=True)
        raise SystemExit(128 + number)

    def interrupt(number: int, frame: Any) -> None:
        raise _Interrupted

    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: leave}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        handlers[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edgeprompt.__version__, message="%(prog)s %(version)s")
def main() -> None:
    """One frozen language model on a device, many tasks.

    Tune soft prompts, export the model to one quantised ONNX graph, and serve every task from it.
    """
