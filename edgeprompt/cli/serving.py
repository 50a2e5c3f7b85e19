"""What `run` and `eval` share: opening a runtime with prompts, and reading records."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

import click

from edgeprompt.cli import console
from edgeprompt.errors import InputError

if TYPE_CHECKING:
    from edgeprompt.evaluation.requests import Questions
    from edgeprompt.options import EngineOptions
    from edgeprompt.package.manifest import Manifest
    from edgeprompt.prompts.file import PromptFile
    from edgeprompt.runtime import Runtime

SUFFIX = ".safetensors"
F = TypeVar("F", bound=Callable[..., Any])


def unescape(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    r"""Option callback: `\n` and `\t` as typed in a shell are a line break and a tab."""
    if isinstance(value, tuple):
        return tuple(unescape(_context, _parameter, item) for item in value)
    return value.replace("\\n", "\n").replace("\\t", "\t") if isinstance(value, str) else value


def runtime_options(command: F) -> F:
    """The options of every command that answers with prompts."""
    return session_options(
        click.option("--allow-base-mismatch", is_flag=True, help="Serve a prompt of another base whose sizes fit.")(
            command
        )
    )


def session_options(command: F) -> F:
    """The options of every command that opens a package."""
    for option in (
        click.option(
            "--cache",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder for packed weights and prefixes: the next process starts faster.",
        ),
        click.option(
            "--workers",
            "--lanes",
            "workers",
            type=console.Whole(min=1),
            help="Compute this many sequences side by side, each on one thread, instead of one on --threads. "
            "More answers per second. --lanes is the old name.",
        ),
        click.option(
            "--drafts",
            is_flag=True,
            help="Check tokens that the answer may copy from the text several at a time (decoders): faster where it "
            "copies, restores or quotes.",
        ),
        click.option(
            "--threads",
            type=console.Whole(min=1),
            help="intra_op_num_threads of the session. Default: one per physical core, and fewer while "
            "other programs keep cores busy.",
        ),
        click.option("--provider", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True),
        click.option(
            "--allow-other-weights",
            is_flag=True,
            help="Serve a prompt that was tuned for weights too far from the package's.",
        ),
    ):
        command = option(command)
    return command


class SessionOptions(TypedDict):
    """What the options of `session_options` were set to."""

    provider: str
    threads: int | None
    workers: int | None
    cache: Path | None
    drafts: bool
    allow_other_weights: bool


def engine_options(session: SessionOptions) -> EngineOptions:
    """The options of a runtime; `cache` is `EngineOptions.cache_folder`."""
    from edgeprompt.options import EngineOptions

    named = {"cache_folder" if name == "cache" else name: value for name, value in session.items()}
    return EngineOptions(**cast("dict[str, Any]", named))


@contextmanager
def open_runtime(
    package: Path, *, max_queue: int | None = None, **session: Unpack[SessionOptions]
) -> Iterator[Runtime]:
    """A runtime over a package, closed at the end."""
    # ONNX Runtime has threads of its own; those that numpy's OpenBLAS starts on import would cost 45 ms and never work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import edgeprompt

    options = engine_options(session)
    if max_queue is not None:
        options = dataclasses.replace(options, max_queue=max_queue)
    runtime = edgeprompt.load(package, options=options)
    try:
        yield runtime
    finally:
        runtime.close()


def find_prompt(package: Path, wanted: str) -> Path:
    """The file of a prompt given by FILE, or by the NAME of one that travels in the package.

    Raises:
        InputError: neither; names those in the package.
    """
    from edgeprompt.package import hub
    from edgeprompt.package.folder import open_package

    if Path(wanted).exists() and not Path(wanted).is_dir():
        return Path(wanted)
    there = hub.parse(wanted)
    if there is not None and (there.file or "").endswith(SUFFIX):
        return hub.fetch_file(there, what="prompt file")
    inside = {path.stem: path for path in open_package(package).prompt_paths}
    if wanted in inside:
        return inside[wanted]
    known = f"in the package: {', '.join(sorted(inside))}" if inside else "the package holds none"
    raise InputError(f"no prompt file {wanted!r} and no prompt of that name ({known})")


def add_prompts(
    runtime: Runtime, package: Path, wanted: Sequence[str], *, allow_base_mismatch: bool
) -> dict[str, PromptFile]:
    """Load prompts into the runtime; name -> prompt without its tensors, in the order given.

    Raises:
        InputError: two prompts of one name.
    """
    prompts: dict[str, PromptFile] = {}
    for item in wanted:
        name = runtime.add_prompt(find_prompt(package, item), allow_base_mismatch=allow_base_mismatch)
        if name in prompts:
            raise InputError(f"two prompts are called {name!r}; give one, or tune the other under another name")
        prompts[name] = dataclasses.replace(
            runtime.prompt(name), prompt_embeddings=None, past_key_values=None, encoder_past_key_values=None
        )
        _note_weights(prompts[name], runtime.manifest)
    return prompts


def _note_weights(prompt: PromptFile, manifest: Manifest) -> None:
    """Say, and no more, when a prompt serves on other weights than it was tuned for."""
    from edgeprompt.prompts.weights import differ

    if prompt.tuned_for is not None and (other := differ(prompt, manifest)):
        console.note(f"note: prompt {prompt.name!r} was tuned for {other}, this package is {manifest.precision}")


def read_texts(source: Path, *, keep_broken: bool = False) -> Iterator[Mapping[str, Any]]:
    """Records of a data file; of a .txt file the lines, as `text`. With `keep_broken`, a line of a .jsonl file that is
    no record is a `BrokenRecord`."""
    from edgeprompt.evaluation.data import read_records
    from edgeprompt.evaluation.formats import read_lines

    if source.suffix.lower() == ".txt":
        check_text(source)
        with source.open("rb") as file:
            yield from read_lines(file, str(source))
    else:
        yield from read_records(source, keep_broken=keep_broken)


def check_text(source: Path) -> None:
    """Refuse what is no regular file.

    Raises:
        DataError: says what it is.
    """
    from edgeprompt.errors import DataError
    from edgeprompt.package.files import check_regular

    try:
        check_regular(source)
    except OSError as error:
        raise DataError(
            f"cannot read {str(source)!r}: {error.strerror or error}; pipe lines into stdin, without --input"
            if source.exists()
            else f"{source}: {error.strerror or error}"
        ) from error


def count_records(source: Path) -> int | None:
    """About how many records a file has (lines, for text), to show what is left; None where that takes reading it."""
    if source.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet as parquet

            return int(parquet.ParquetFile(source).metadata.num_rows)
        except (ImportError, OSError, ValueError):
            return None
    if not source.is_file():
        return None
    with source.open("rb") as file:
        lines, last = 0, b"\n"
        for piece in iter(lambda: file.read(1 << 20), b""):
            lines, last = lines + piece.count(b"\n"), piece[-1:]
    return max(0, lines + (last != b"\n") - (source.suffix.lower() in (".csv", ".tsv")))


def settings_of(
    package: Path,
    source: Path | None,
    wanted: Sequence[str],
    folders: Sequence[Path],
    questions: Questions,
    **more: object,
) -> str:
    """What a resumed run must share with the one that it goes on from; `source` None: the caller looks at the input."""
    from edgeprompt.package.files import sha256_file, stamps_sha256
    from edgeprompt.package.folder import open_package

    manifest = open_package(package).manifest
    facts = dataclasses.asdict(questions)
    for name in ("prompts", "folders"):
        del facts[name]
    return json.dumps(
        {
            "input": None if source is None else [source.name, sha256_file(source)],
            "package": [manifest.weights_hash, manifest.tokenizer_fingerprint, manifest.generation],
            "prompts": [sha256_file(find_prompt(package, item)) for item in wanted],
            "folders": [stamps_sha256(sorted(folder.resolve().glob(f"*{SUFFIX}"))) for folder in folders],
            **more,
            **facts,
        },
        sort_keys=True,
        default=str,
    )
