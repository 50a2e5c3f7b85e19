"""The command line: one file per command, imported when it is asked for.

A command's file exposes `command` (a click command) and imports nothing heavy at its top.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

import edgeprompt
from edgeprompt.cli import console
from edgeprompt.errors import EdgePromptError, MissingDependencyError

COMMANDS = ("tune", "export", "convert", "run", "eval", "bench", "serve", "push", "inspect", "validate")

_AGAIN_S = 0.01
"""After a signal whose exception was lost, so long until it is sent again."""


class _Failed(click.ClickException):
    """The work failed: one line on stderr, exit code 1 (of a signal 128 and its number)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"error: {' '.join(self.message.split())}", file=file, err=file is None)


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C. CPython ends a process by the signal if a plain KeyboardInterrupt passed through `exec`, even one that
    was caught; dataclasses are made by `exec`, so that would depend on the moment."""


class _Stopped(SystemExit):
    """SIGTERM or SIGHUP: the exit code is 128 and the signal's number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.name = signal.Signals(number).name


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

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run with all three standard streams open; --help and --version fail in one line too."""
        console.open_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            _Failed(error.strerror or str(error)).show()
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what edgeprompt or the operating system refuses is one line, any other exception is a bug."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has gone; click ends quietly
        except EdgePromptError as error:
            raise _Failed(str(error), getattr(error, "exit_code", 1)) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _Failed(where + (error.strerror or str(error))) from error
        except UnicodeEncodeError as error:
            found = error.object[error.start : error.start + 1]
            raise _Failed(
                f"the answer has {found!a}, which stdout ({getattr(sys.stdout, 'encoding', None)}) cannot write; set "
                "PYTHONIOENCODING=utf-8, or write to a file (--output) or as --json"
            ) from error
        except _Stopped as error:
            raise _Failed(f"stopped by {error.name}", int(str(error.code))) from error
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
    """Let Ctrl-C, SIGTERM and SIGHUP unwind, so that half-written outputs are removed; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    heard: list[int] = []

    def stop(number: int, frame: Any) -> None:
        heard.append(number)
        for known in before:
            signal.signal(known, signal.SIG_DFL)
        raise _exception_of(number)

    def lost(unraisable: Any) -> None:
        """What is raised while an object is deleted is lost, also what `stop` raised: the signal comes once more."""
        if not isinstance(unraisable.exc_value, (_Interrupted, _Stopped)):
            usual_lost(unraisable)
            return
        for known in before:
            signal.signal(known, stop)
        number = getattr(unraisable.exc_value, "number", signal.SIGINT)
        again = threading.Timer(_AGAIN_S, _send_to_main, [number])
        again.daemon = True
        again.start()

    usual = dict.fromkeys(("SIGTERM", "SIGHUP"), signal.SIG_DFL) | {"SIGINT": signal.default_int_handler}
    for name, handler in usual.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is handler:  # not where it is ignored (nohup)
            before[number] = signal.signal(number, stop)
    usual_lost, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    except Exception as error:
        # Extension modules and lazy imports make errors of their own of what is raised inside them. Ours of a signal,
        # which say how to go on, have their exit code, as click's have.
        if heard and getattr(error, "exit_code", None) is None:
            raise _exception_of(heard[0]) from error
        raise
    finally:
        sys.unraisablehook = usual_lost
        for number, handler in before.items():
            signal.signal(number, handler)


def _exception_of(number: int) -> BaseException:
    return _Interrupted() if number == signal.SIGINT else _Stopped(number)


def _send_to_main(number: int) -> None:
    """Send a signal to the main thread, which wakes it where it waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(edgeprompt.__version__, message="%(prog)s %(version)s")
def main() -> None:
    """One frozen language model on a device, many tasks.

    Tune soft prompts, export the model to one quantised ONNX graph, and serve every task from it.
    """
