"""Files in, files out, on a cluster: `edgeprompt run --engine ray`."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from edgeprompt import progress
from edgeprompt.errors import DataError, EdgePromptError, InferenceError, InputError
from edgeprompt.options import EngineOptions
from edgeprompt.ray.answers import BATCH, answer, cpus_of, import_ray, pool, root_cause, without_views

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
_SHARE = 0.25
"""Processor cores that reading and writing take beside the actors."""
_LEAST_BYTES, _MOST_BYTES, _BLOCKS_AN_ACTOR = 1 << 14, 1 << 19, 8
"""Of a block of records: least and most bytes, and how many an actor has of a small input."""
_CONNECT_S = 10
"""Seconds until a cluster that does not answer counts as none."""
_FIRST = 1024
"""Records whose columns are those of the input, and of a parquet output."""


@dataclass(frozen=True)
class Job:
    """What a run reads, answers and writes."""

    source: Path
    """A file, or a folder of files of one kind."""
    out: Path
    """A folder that is not there yet."""
    package: str
    answers: dict[str, Any]
    """Keywords of `Answers`."""
    id_column: str | None = None
    """A column whose values are all different; None: the file and the place in it."""
    resume: bool = False
    settings: str = ""
    """What a run must share with the one that it goes on from."""
    address: str | None = None
    """Of a cluster; None: this machine."""
    actors: tuple[int, int | None] | None = None
    files: tuple[Path, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Look at the input and the output.

        Raises:
            InputError, DataError: nothing to read, or nowhere to write.
        """
        object.__setattr__(self, "out", Path(os.path.abspath(self.out)))
        object.__setattr__(self, "files", find_files(self.source))
        pool(self.actors)
        if os.path.lexists(self.out):
            raise InputError(f"output {str(self.out)!r} exists already; give another path, or remove it first")
        if self.suffix not in SUFFIXES:
            raise InputError(f"output {str(self.out)!r} ends in {self.suffix!r}; known: {', '.join(SUFFIXES)}")

    @property
    def suffix(self) -> str:
        """Of the parts of the output: that of the folder's name, or the input's."""
        return self.out.suffix.lower() or self.files[0].suffix.lower()

    def first_records(self) -> list[Mapping[str, Any]]:
        """Whose columns are taken for those of the input. A file may have none: Spark writes such.

        Raises:
            DataError: no file has a record.
        """
        from edgeprompt.evaluation.formats import read_file

        found = [*islice(chain.from_iterable(map(read_file, self.files)), _FIRST)]
        if not found:
            raise DataError(f"data {str(self.source)!r} is empty: it has no row")
        return found

    @property
    def here(self) -> bool:
        """Whether the job has a cluster of its own on this machine."""
        return not (self.address or os.environ.get("RAY_ADDRESS"))

    @property
    def sizes(self) -> tuple[int, int | None]:
        """The least and the most actors; on this machine no more than it has cores for."""
        cpus = cpus_of(self.answers.get("engine") or EngineOptions())
        return self.actors or (1, max(1, _cores() // cpus) if self.here else None)

    @property
    def part(self) -> Path:
        """Where the output lies until it is whole."""
        return self.out.with_name(self.out.name + ".part")


@dataclass(frozen=True)
class Report:
    """What became of a run."""

    rows: int
    """Records that were answered, in this run."""
    failed: int
    """Those without an answer."""
    first: str | None
    """Why the first of them has none."""
    seconds: float
    """From the first batch that was answered to the last."""
    begun: int
    """Records of the first batch."""

    @property
    def rate(self) -> float | None:
        """Records a second behind the first batch, so without the time in which the cluster and the actors start."""
        return (self.rows - self.begun) / self.seconds if self.seconds > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_files(source: Path) -> tuple[Path, ...]:
    """The files of an input, sorted; hidden ones and those that begin with "_" are none.

    Raises:
        DataError: there is none, or they are of several kinds.
    """
    if source.is_file():
        found = [source]
    else:
        found = sorted(
            path
            for path in source.rglob("*")
            if path.is_file() and not any(part[0] in "._" for part in path.relative_to(source).parts)
        )
    kinds = sorted({path.suffix.lower() for path in found})
    if not found:
        raise DataError(f"no data at {str(source)!r}: give a file, or a folder of files ({', '.join(SUFFIXES)})")
    if len(kinds) > 1 or kinds[0] not in SUFFIXES:
        raise DataError(
            f"{str(source)!r} has files that end in {', '.join(kinds)}; give one kind of {', '.join(SUFFIXES)}"
        )
    return tuple(path.absolute() for path in found)


def run(job: Job, *, total: int | None = None) -> Report:
    """Answer every record; the output appears when it is whole.

    Args:
        job: what to do.
        total: records of the input, for the progress on stderr; None: not known.

    Raises:
        EdgePromptError: a package, prompt or file cannot be used, or the job failed.
        MissingDependencyError: the extra `ray` is not installed.
    """
    ray = import_ray()
    with _folder(job) as (data, ids), _cluster(ray, job), _context(ray, job, ids):
        done = _rows_of(ids) if job.resume else 0
        tally = ray.remote(num_cpus=0)(_Tally).remote()
        try:
            with _progress(ray, tally, total, done):
                _execute(ray, job, tally, data)
        except EdgePromptError:
            raise
        except (ray.exceptions.RayError, ValueError, RuntimeError, OSError) as error:
            cause = root_cause(error)
            if cause is not None:
                raise type(cause)(str(cause)) from error
            raise InferenceError(f"the job failed in Ray: {_line(error)}") from error
        report = Report(*ray.get(tally.told.remote()))
        if job.resume:
            _check_ids(job, ids)
        data.mkdir(exist_ok=True)
    return report


def _execute(ray: Any, job: Job, tally: Any, data: Path) -> None:
    """Read, answer and write."""
    import pyarrow

    from edgeprompt.ray.files import ROW, AnswerFiles, FileAnswers, RecordFiles

    paths = [str(path) for path in job.files]
    packed = job.files[0].suffix.lower() != ".parquet"
    as_lines = None if job.suffix == ".parquet" else "jsonl" if job.suffix == ".jsonl" else "csv"
    schema = _schema(job) if packed and as_lines is None else None
    _check_columns(job, packed, () if schema is None else schema.names)
    # On one machine, more readers and writers than actors would only take their time.
    few = {"num_cpus": _SHARE, "concurrency": max(1, _cores() // 2) if job.here else None}
    if packed:
        found = ray.data.read_datasource(RecordFiles(paths, id_column=job.id_column), **few)
    else:
        try:
            found = ray.data.read_parquet(
                paths, schema=_plain_columns(paths), include_row_hash=job.id_column is None, **few
            )
        except pyarrow.ArrowException as error:
            raise DataError(
                f"the files of {str(job.source)!r} do not have the same columns ({_line(error)}); write them alike, or "
                "run them one by one"
            ) from error
    keywords = {
        **job.answers,
        "actor": FileAnswers,
        "id_column": job.id_column or ROW,
        "added": job.id_column is None,
        "packed": packed,
        "as_lines": as_lines,
        "schema": schema,
        "tally": tally,
    }
    answered = answer(found, job.package, actors=job.sizes, batch_size=BATCH, **keywords)
    sink = AnswerFiles(str(data), job.suffix, without=ROW if job.id_column is None and as_lines is None else None)
    answered.write_datasink(sink, ray_remote_args={"num_cpus": _SHARE}, concurrency=few["concurrency"])


def _plain_columns(paths: Sequence[str]) -> Any:
    """The columns of all parquet files where one has views, which Ray cannot filter; None lets Ray look at them."""
    import pyarrow
    import pyarrow.parquet as parquet

    schemas = [parquet.read_schema(path) for path in paths]
    plain = [*map(without_views, schemas)]
    return None if plain == schemas else pyarrow.unify_schemas(plain)


def _check_columns(job: Job, packed: bool, names: Sequence[str]) -> None:
    """Whether what tells rows apart can be a column beside the others; `names`: those of a table made from lines."""
    from edgeprompt.ray.files import ROW

    if job.id_column in ("prompt", "answer", "score", "error"):
        raise InputError(f"--id-column {job.id_column} is also a column of the answers; rename it in the input")
    if not packed:
        import pyarrow.parquet as parquet

        names = parquet.read_schema(job.files[0]).names
    if job.id_column is None and ROW in names:
        raise InputError(f"the input has a column {ROW!r}, which Ray makes too; rename it, or give it as --id-column")
    if not packed and job.id_column is not None:
        for file in job.files:
            _check_id_column(file, job.id_column)


def _check_id_column(file: Path, name: str) -> None:
    """Whether every row of a parquet file has an id, as the lines of other files are checked when they are read.

    Raises:
        DataError: the column is not there or holds lists or objects, or a row has nothing in it.
    """
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as opened:
        schema = opened.schema_arrow
        if name not in schema.names:
            raise DataError(f"{str(file)!r} has no column {name!r}; it has: {', '.join(schema.names)}")
        if schema.field(name).type.num_fields:
            raise DataError(f"column {name!r} of {str(file)!r} holds lists or objects; an id is a text or a number")
        empty = sum(batch.column(0).null_count for batch in opened.iter_batches(columns=[name]))
        if empty:
            raise DataError(
                f"{empty} rows of {str(file)!r} have nothing in column {name!r}, so nothing tells them apart; fill it "
                "in, or give another --id-column or none"
            )


def _schema(job: Job) -> Any:
    """Columns of a parquet output, from the first records; a column without a value is one of text."""
    import pyarrow

    from edgeprompt.evaluation.rows import Answered, Form

    form = Form(with_errors=job.answers.get("on_error", "record") == "record")
    rows = [form.cells(Answered(row, "", None, None)) for row in job.first_records()]
    try:
        found = pyarrow.Table.from_pylist(rows).schema
    except pyarrow.ArrowException as error:
        raise DataError(f"the columns are no table ({_line(error)}); write .jsonl") from error
    names = dict.fromkeys(name for row in rows for name in row)
    fields = {name: found.field(name) if name in found.names else pyarrow.field(name, pyarrow.null()) for name in names}
    text = pyarrow.string()
    return pyarrow.schema([f.with_type(text) if pyarrow.types.is_null(f.type) else f for f in fields.values()])


@contextmanager
def _folder(job: Job) -> Iterator[tuple[Path, Path]]:
    """Folders for parts of the output and for what is done; the first is renamed at the end."""
    from edgeprompt.package.files import stamps_sha256, write_atomic
    from edgeprompt.package.outputs import TEXT, writing

    part, journal = job.part, job.part / "run.json"
    data, ids = part / "data", part / "ids"
    if os.path.lexists(part):
        if not journal.is_file():
            raise InputError(f"{str(part)!r} lies there, and is of no run that can be resumed; move it away")
        if not job.resume:
            raise InputError(f"{str(part)!r} is of a run that did not end; give --resume, or remove it to begin anew")
    with writing(job.out):
        part.mkdir(parents=True, exist_ok=True)
    with (part / "lock").open("w") as lock:
        _lock(lock, part)
        settings = {"settings": job.settings, "files": stamps_sha256(job.files), "id_column": job.id_column}
        if not journal.exists():
            write_atomic(journal, json.dumps(settings).encode(), TEXT)
        elif json.loads(journal.read_bytes()) != settings:
            raise InputError(
                f"{str(part)!r} was begun with another input, package, prompt or option; give the same, or remove it "
                "to begin anew"
            )
        try:
            yield data, ids
            data.rename(job.out)
        except BaseException:
            if not job.resume:
                shutil.rmtree(part, ignore_errors=True)
            raise
        shutil.rmtree(part)


def _lock(file: Any, part: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"another run writes into {str(part)!r}; wait for it, or give another output") from error


@contextmanager
def _cluster(ray: Any, job: Job) -> Iterator[None]:
    """Join a cluster, or have one on this machine while the job lasts."""
    begun = not ray.is_initialized()
    engine = job.answers.get("engine") or EngineOptions()
    if begun:
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
        try:
            with _own_signals():
                if not job.here:
                    _check_address(job.address or os.environ["RAY_ADDRESS"])
                    ray.init(address=job.address, **quiet)
                else:
                    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
                    # Two more for what Ray runs beside the actors: reading, writing, and passing over what is done.
                    ray.init(address="local", num_cpus=_cores() + 2, include_dashboard=False, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = job.address or os.environ.get("RAY_ADDRESS")
            raise InputError(f"no Ray cluster at {where!r}: {_line(error)}") from error
    try:
        least = job.sizes[0] * cpus_of(engine) + (1 if job.resume else 0) + 2 * _SHARE
        found = ray.cluster_resources().get("CPU", 0)
        if found < least:
            raise InputError(f"the cluster has {found:g} CPUs; this needs {least:g}: fewer --actors or --threads")
        yield
    finally:
        if begun:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Ask whether anybody listens at HOST:PORT, since Ray would try for minutes; other forms are Ray's to look at.

    Raises:
        ConnectionError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(getattr(error, "strerror", None) or str(error)) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Let signals be handled as before: Ray's handlers would end the process with nothing put away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _block_bytes(job: Job, cpus: int) -> int:
    """Bytes of what an actor gets at once, at most about some thousand texts: what a worker that is lost loses.

    A small input has several for each actor. A single one would leave the others without work.
    """
    actors = job.sizes[1] or max(job.sizes[0], cpus)
    whole = sum(path.stat().st_size for path in job.files)
    return min(_MOST_BYTES, max(_LEAST_BYTES, whole // (_BLOCKS_AN_ACTOR * actors)))


@contextmanager
def _context(ray: Any, job: Job, ids: Path) -> Iterator[None]:
    """Ray Data's settings for this job."""
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    from edgeprompt.ray.files import ROW

    for name in ("ray.data", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is raised as well
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = _block_bytes(job, int(ray.cluster_resources().get("CPU", 1)))
    if job.resume:
        config = CheckpointConfig(job.id_column or ROW, str(ids), delete_checkpoint_on_success=False)
        config.checkpoint_actor_pool_max_size = 1
        config.checkpoint_actor_memory_bytes = 64 << 20
        context.checkpoint_config = config
    with DataContext.current(context):
        yield


class _Tally:
    """An actor that counts."""

    def __init__(self) -> None:
        self._rows = 0
        self._failed: dict[Any, int] = {}
        self._first: str | None = None
        self._begun = 0
        self._times: list[float] = []

    def add(self, key: Any, rows: int, failed: int, first: str | None) -> None:
        """A batch was answered; `key` is the same when it is answered again."""
        self._rows += rows
        self._begun = self._begun or rows
        self._times = [*self._times[:1], time.monotonic()]
        if failed:
            self._failed[key] = failed
            self._first = self._first or first

    def told(self) -> tuple[int, int, str | None, float, int]:
        """The fields of a `Report`."""
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        return self._rows, sum(self._failed.values()), self._first, seconds, self._begun


@contextmanager
def _progress(ray: Any, tally: Any, total: int | None, done: int) -> Iterator[None]:
    """Rows and rows/s on stderr while the job runs."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(1.0):
            try:
                rows, failed, *_ = ray.get(tally.told.remote(), timeout=10)
            except Exception:  # the cluster is being shut down
                return
            update(done + rows, f"{failed} failed" if failed else "")

    with progress.show("run", total, start=done, unit="rows") as update:
        thread = threading.Thread(target=ask, name="edgeprompt-ray-progress", daemon=True)
        with progress.beside(thread, ended, timeout=15):
            yield


def _rows_of(ids: Path) -> int:
    """Records that earlier runs wrote."""
    import pyarrow.parquet as parquet

    found = [path for path in ids.glob("*.parquet") if not path.name.endswith(".pending.parquet")]
    return sum(parquet.read_metadata(path).num_rows for path in found)


def _check_ids(job: Job, ids: Path) -> None:
    """Whether every record was written once.

    Raises:
        DataError: one was written twice; the output is not made.
    """
    import numpy as np
    import pyarrow.parquet as parquet

    if not any(ids.glob("*.parquet")):
        return
    column = parquet.read_table(ids).column(0).combine_chunks()
    twice = len(column) - len(np.unique(column.to_numpy(zero_copy_only=False)))
    if twice:
        name = f"column {job.id_column!r} has" if job.id_column else "the answers have"
        raise DataError(
            f"{name} {twice} rows more than once, so an interrupted run may have left some out; remove "
            f"{str(job.part)!r} and begin anew, with an --id-column whose values are all different"
        )


def _line(error: BaseException) -> str:
    """The words of an error on one line; of a traceback in them, those of the error that came first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)), None)
    return (first or (lines[-1] if lines else type(error).__name__))[:300]
