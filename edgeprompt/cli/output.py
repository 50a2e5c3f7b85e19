"""Where answers of `run` go: lines on stdout, or a file that keeps the input's columns and can be resumed."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgeprompt.cli import console
from edgeprompt.errors import InputError
from edgeprompt.evaluation.rows import Answered, Form, columns_of, csv_line

if TYPE_CHECKING:
    from edgeprompt.package.outputs import Kind

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


class Lines:
    """Answers on stdout."""

    done = 0

    def __init__(self, form: Form) -> None:
        self._form = replace(form, escaped=not console.holds_unicode())

    def write(self, answers: list[Answered], records: int) -> None:
        """Write the answers to some records."""
        for answered in answers:
            click.echo(self._form.line(answered), file=sys.stdout)


class Table:
    """Answers in a file that appears when all are written; `done` records were answered by an earlier run."""

    def __init__(
        self, path: Path, form: Form, part: Path, *, journal: Path | None, settings: str, schema: Any = None
    ) -> None:
        """`part`: where answers are collected; `journal`: how far they are, None: nothing will be resumed; `schema`: of
        the input's columns, for a parquet file."""
        self._form, self._part, self._journal, self._settings = form, part, journal, settings
        self._suffix = path.suffix.lower()
        self.done = 0
        self._header: list[str] | None = None
        if self._suffix == ".parquet":
            self._schema = _with_facts(schema, form)
            self._header = list(map(str, self._schema))
        before = self._header
        size = 0
        if journal is not None and journal.exists():
            try:
                state = json.loads(journal.read_text("utf-8"))
                self.done, size, self._header = int(state["records"]), int(state["bytes"]), state["header"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{str(journal)!r} is no journal of edgeprompt run; remove it to begin anew"
                ) from error
            if state.get("settings") != settings or (before is not None and before != self._header):
                raise InputError(
                    f"{str(part)!r} was begun with another input, package, prompt or option; give the same, or remove "
                    f"it and {journal.name!r} to begin anew"
                )
        elif journal is not None:
            self._note(0)
        if size and (not part.exists() or part.stat().st_size < size):
            what = "is shorter than its journal says" if part.exists() else "is gone"
            raise InputError(f"{str(part)!r} {what}; remove {part.name + '.json'!r} to begin anew")
        self._file: IO[bytes] = part.open("r+b" if size else "ab")  # "w" would empty a file that another run writes
        if journal is not None and not _locked(self._file):
            self._file.close()
            raise InputError(f"another run writes {str(part)!r}; wait for its end, or give another --output")
        self._file.truncate(size)  # answers behind the journal may be half written
        self._file.seek(size)

    def write(self, answers: list[Answered], records: int) -> None:
        """Write the answers to `records` records, and note how far the file is."""
        if self._suffix == ".parquet":
            self._file.write(_packed([self._form.cells(answered) for answered in answers], self._schema))
        else:
            text = io.StringIO(newline="")
            for answered in answers:
                self._row(answered, text)
            self._file.write(self._encoded(text.getvalue()))
        self.done += records
        if self._journal is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._note(self._file.tell())

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            if self._suffix == ".jsonl" or self._form.as_json:
                return text.encode("utf-8", "backslashreplace")  # an escape of JSON, which is read as the same
            raise _half_pair(error) from error

    def _note(self, size: int) -> None:
        from edgeprompt.package.files import write_atomic
        from edgeprompt.package.outputs import JOURNAL

        assert self._journal is not None
        state = {"records": self.done, "bytes": size, "header": self._header, "settings": self._settings}
        write_atomic(self._journal, json.dumps(state).encode(), JOURNAL)

    def _row(self, answered: Answered, text: IO[str]) -> None:
        if self._suffix in (".csv", ".tsv") and not self._form.as_json:
            cells = self._form.cells(answered)
            if self._header is None:
                self._header = list(cells)
                text.write(csv_line(self._header, self._suffix))
            if set(cells) != set(self._header):
                raise InputError(f"a row has other columns than the first ({', '.join(self._header)}); write .jsonl")
            text.write(csv_line((cells[name] for name in self._header), self._suffix))
        elif self._suffix == ".jsonl":
            text.write(self._form.json(answered) + "\n")
        else:
            text.write(self._form.line(answered) + "\n")

    def finish(self) -> Path:
        """Close the file; a parquet file is made of the batches in it. Returns the file that is whole."""
        self._file.close()
        return _to_parquet(self._part, self._schema) if self._suffix == ".parquet" else self._part

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


def _locked(file: IO[bytes]) -> bool:
    """Lock a file for as long as it is open; False where another process has it. Without `fcntl` nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _half_pair(error: UnicodeEncodeError) -> InputError:
    return InputError(
        f"a record holds half of a surrogate pair (U+{ord(error.object[error.start]):04X}), which no file but .jsonl "
        "can hold; write .jsonl, or repair the record"
    )


def kind_of(path: Path) -> Kind:
    """What an output file is, for the rule about what it may replace."""
    from edgeprompt.package.outputs import RUN_ANSWERS, RUN_PARQUET

    return RUN_PARQUET if path.suffix.lower() == ".parquet" else RUN_ANSWERS


@contextmanager
def table(
    path: Path, form: Form, *, schema: Any, resume: bool, settings: str, force: bool, sources: tuple[object, ...]
) -> Iterator[Table]:
    """A file of answers, whole or not at all; with `resume` what is answered lies in `PATH.part` until it is whole.

    Raises:
        InputError: what lies there is of another run.
    """
    from edgeprompt.package.files import atomic_file
    from edgeprompt.package.outputs import check_output, writing

    kind = kind_of(path)
    if not resume:
        with atomic_file(path, kind, force=force, sources=sources) as temporary:
            made = Table(path, form, temporary, journal=None, settings=settings, schema=schema)
            try:
                yield made
                if (whole := made.finish()) != temporary:
                    whole.replace(temporary)
            finally:
                made.close()
        return
    part, journal = (path.with_name(path.name + end) for end in (".part", ".part.json"))
    with writing(path):
        part.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and not journal.exists():
        raise InputError(f"{str(part)!r} lies there, and no journal of edgeprompt run beside it; move it away")
    made = Table(path, form, part, journal=journal, settings=settings, schema=schema)
    try:
        yield made
        whole = made.finish()
        whole.replace(check_output(path, kind, force=force, sources=sources))  # also what came to lie there meanwhile
    finally:
        made.close()
    part.unlink(missing_ok=True)
    journal.unlink(missing_ok=True)


def parquet_schema(rows: Iterable[Mapping[str, Any]], known: Any = None) -> Any:
    """The schema (of pyarrow) of rows: every column that one of them has; memory holds 1024 of them.

    `known` is one that each row must fit, None: it is found out.

    Raises:
        DataError: a column holds values of kinds that do not go together.
        MissingDependencyError: pyarrow is not installed.
    """
    from edgeprompt.errors import DataError, MissingDependencyError
    from edgeprompt.evaluation.requests import batches

    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError("parquet files need pyarrow: pip install 'edgeprompt[tune]'") from error
    schema = known or pyarrow.schema([])
    try:
        for some in batches(rows, 1024):
            if known is not None:
                pyarrow.Table.from_pylist(some, schema=known)
                continue
            found = pyarrow.schema([*pyarrow.array(some).type])
            schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    except (pyarrow.ArrowException, OverflowError) as error:
        raise DataError(f"the columns are no table ({' '.join(str(error).split())}); write .jsonl") from error
    except UnicodeEncodeError as error:
        raise _half_pair(error) from error
    if known is not None:
        return known
    texts = [f.with_type(pyarrow.string()) if pyarrow.types.is_null(f.type) else f for f in schema]
    return pyarrow.schema(texts)


def _with_facts(schema: Any, form: Form) -> Any:
    """The schema of the input's columns, and of what is put beside them."""
    import pyarrow

    facts = dict.fromkeys(form.names, pyarrow.string())
    columns = columns_of({field.name: field.type for field in schema}, facts)
    return pyarrow.schema([*columns.items(), *facts.items()])


def _packed(rows: list[dict[str, Any]], schema: Any) -> bytes:
    """Rows as a stream of Arrow, whole in itself: behind others in one file, it can be cut off again."""
    import pyarrow

    made = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(made, schema) as stream:
        try:
            stream.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        except UnicodeEncodeError as error:
            raise _half_pair(error) from error
    return bytes(made.getvalue())


def _to_parquet(part: Path, schema: Any) -> Path:
    """A parquet file beside a file of Arrow streams, in groups of 1024 rows or more."""
    import pyarrow
    import pyarrow.parquet as parquet

    target = part.with_name(part.name + ".parquet")
    try:
        with parquet.ParquetWriter(target, schema) as writer, part.open("rb") as file:
            waiting: list[Any] = []
            size = part.stat().st_size
            while file.tell() < size:
                with pyarrow.ipc.open_stream(file) as stream:
                    waiting += stream
                if sum(batch.num_rows for batch in waiting) >= 1024 or file.tell() >= size:
                    writer.write_table(pyarrow.Table.from_batches(waiting, schema))
                    waiting = []
    except BaseException:  # a signal too
        target.unlink(missing_ok=True)
        raise
    return target
