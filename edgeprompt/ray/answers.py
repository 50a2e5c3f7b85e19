"""What an actor does: one runtime, and answers to batches of records of any tasks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprompt import errors
from edgeprompt.errors import EdgePromptError, InputError, MissingDependencyError
from edgeprompt.evaluation.rows import Answered, Form, columns_of
from edgeprompt.options import EngineOptions
from edgeprompt.request import GenerationOptions

if TYPE_CHECKING:
    from edgeprompt.package.folder import Package
    from edgeprompt.runtime import Runtime

ON_ERROR = ("stop", "skip", "record")
BATCH = 256
"""Records that an actor answers at once."""
LEAST_PREFIX_BUDGET = 128 << 20
THIS = "this row"
"""What messages call a record: in a cluster it has no number."""


def import_ray() -> Any:
    """The ray module, with Ray Data.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(f"Ray Data is not installed ({error}): pip install 'edgeprompt[ray]'") from error
    return ray


class Answers:
    """A class for `ray.data.Dataset.map_batches` with `batch_format="pyarrow"`: each actor has one runtime.

    A batch may be of any tasks. The columns `prompt`, `answer`, `score` and `error` are put beside the batch's own; one
    of these that is called so becomes `input_NAME`.
    """

    def __init__(
        self,
        package: str | os.PathLike[str],
        *,
        prompts: Sequence[str | os.PathLike[str]] = (),
        folders: Sequence[str | os.PathLike[str]] = (),
        prompt_column: str | None = None,
        text_column: str = "text",
        options: GenerationOptions | None = None,
        engine: EngineOptions | None = None,
        chat: bool = False,
        truncate: bool = False,
        on_error: str = "record",
        allow_base_mismatch: bool = False,
        tally: Any = None,
    ) -> None:
        """Open the package. All paths must be there on every machine.

        Args:
            package: the folder, or `user/repo` on the Hub.
            prompts: files of prompts. Without `prompt_column`, every record is answered with each.
            folders: of prompts, which `prompt_column` names.
            prompt_column: names the prompt of each record.
            text_column: fills `{text}`.
            options: how to generate.
            engine: the runtime's. None: one thread. Without a `cache_folder`, the user's cache folder keeps the packed
                graph, which the actors of one machine share. Without a `prefix_budget`, the actors of one machine
                together keep an eighth of its free memory.
            chat: put each text into the chat template.
            truncate: cut texts that exceed the context.
            on_error: "record" fills the column `error`, "skip" leaves the record out, "stop" fails the job.
            allow_base_mismatch: serve prompts of another base whose sizes fit.
            tally: an actor whose `add(key, rows, failed, first)` hears of every batch.

        Raises:
            EdgePromptError: the package or a prompt cannot be served.
        """
        from edgeprompt.evaluation.requests import Questions

        if on_error not in ON_ERROR:
            raise InputError(f"on_error is {on_error!r}; allowed: {', '.join(ON_ERROR)}")
        if folders and not prompt_column:
            raise InputError("a folder of prompts needs prompt_column: the column that names the prompt of each record")
        self._on_error, self._tally = on_error, tally
        self._form = Form(with_errors=on_error == "record")
        self._runtime = open_shared(package, engine or EngineOptions())
        names = [self._runtime.add_prompt(path, allow_base_mismatch=allow_base_mismatch) for path in prompts]
        for folder in folders:
            self._runtime.add_folder(folder)
        self._questions = Questions(
            tuple(names), bool(folders), text_column, prompt_column, options or GenerationOptions(), chat, truncate
        )

    def __call__(self, batch: Any) -> Any:
        """The batch with its answers, both Arrow tables.

        Raises:
            DataError: a column that is asked for is not there.
        """
        import pyarrow

        from edgeprompt.evaluation.requests import check_columns

        batch = batch.cast(without_views(batch.schema))
        check_columns(self._questions, batch.column_names, self._runtime.describe, "the data")
        records = batch.to_pylist()
        answers = [*self.answers(records, repr(records[:1]))]
        kept = batch.take(pyarrow.array([index for index, _ in answers], pyarrow.int64()))
        facts = [self._form.facts(answered) for _, answered in answers]
        names = self._form.names
        kept = kept.rename_columns([*columns_of(dict.fromkeys(kept.column_names), dict.fromkeys(names))])
        for name in names:
            kept = kept.append_column(name, pyarrow.array([row[name] for row in facts], pyarrow.string()))
        return kept

    def answers(self, records: Sequence[Mapping[str, Any]], key: Any = None) -> Iterator[tuple[int, Answered]]:
        """The answers to records that are not left out, each with the place of its record.

        Args:
            records: any number.
            key: what the tally knows the batch by.
        """
        from edgeprompt.evaluation.requests import answer as answer_all
        from edgeprompt.evaluation.requests import told

        failed, first = 0, None
        named = [(THIS, record) for record in records]
        for index, answered, error in answer_all(self._runtime, self._questions, named):
            message = None if error is None else told("", error)
            if error is not None:
                if self._on_error == "stop":
                    raise error
                failed, first = failed + 1, first or message
            if error is None or self._on_error == "record":
                yield index, replace(answered, error=message)
        if self._tally is not None:
            self._tally.add.remote(key, len(records), failed, first)


def answer(
    dataset: Any,
    package: str | os.PathLike[str],
    *,
    actors: int | tuple[int, int | None] | None = None,
    num_cpus: float | None = None,
    batch_size: int = BATCH,
    **keywords: Any,
) -> Any:
    """A Ray dataset with the answers to each of its records; nothing is computed before the dataset is used.

    Args:
        dataset: of `ray.data`.
        package: the folder, the same on every machine, or `user/repo` on the Hub.
        actors: how many, or the least and the most (None: as many as the cluster has room for). None: from one on.
        num_cpus: of an actor. None: its workers or threads.
        batch_size: records that an actor answers at once.
        keywords: of `Answers`.

    Raises:
        InputError: an option is wrong.
    """
    import_ray()
    from ray.data import ActorPoolStrategy

    engine = keywords.get("engine") or EngineOptions()
    return dataset.map_batches(
        keywords.pop("actor", Answers),
        fn_constructor_args=(os.fspath(package),),
        fn_constructor_kwargs=keywords,
        batch_format="pyarrow",
        batch_size=batch_size,
        num_cpus=num_cpus or cpus_of(engine),
        compute=ActorPoolStrategy(**pool(actors)),
    )


def without_views(schema: Any) -> Any:
    """An Arrow schema with `string` for `string_view`, and so on: rows of views cannot be taken or filtered."""
    import pyarrow
    from pyarrow import types

    def plain(kind: Any) -> Any:
        if "_view" not in str(kind):
            return kind
        if types.is_struct(kind):
            return pyarrow.struct([field.with_type(plain(field.type)) for field in kind])
        if types.is_map(kind):
            return pyarrow.map_(plain(kind.key_type), plain(kind.item_type))
        if types.is_fixed_size_list(kind):
            return pyarrow.list_(plain(kind.value_type), kind.list_size)
        if types.is_large_list(kind):
            return pyarrow.large_list(plain(kind.value_type))
        if types.is_list(kind):
            return pyarrow.list_(plain(kind.value_type))
        return {pyarrow.string_view(): pyarrow.string(), pyarrow.binary_view(): pyarrow.binary()}.get(kind, kind)

    return pyarrow.schema([field.with_type(plain(field.type)) for field in schema], schema.metadata)


def pool(actors: int | tuple[int, int | None] | None) -> dict[str, int]:
    """The sizes of a pool of actors, as Ray names them.

    Raises:
        InputError: they are no sizes.
    """
    least, most = (actors, actors) if isinstance(actors, int) else actors or (1, None)
    if least < 1 or (most is not None and most < least):
        raise InputError(f"actors is {actors!r}; give a number from 1 on, or the least and the most")
    return {"min_size": least} if most is None else {"min_size": least, "max_size": most}


def cpus_of(engine: EngineOptions) -> int:
    """Processor cores that a runtime keeps busy."""
    return engine.workers or engine.threads or 1


def open_shared(package: str | os.PathLike[str], engine: EngineOptions) -> Runtime:
    """A runtime whose weights are mapped from a packed graph, so that the processes of one machine share them."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import edgeprompt
    from edgeprompt.package.folder import open_package

    if engine.workers is None and engine.threads is None:
        engine = replace(engine, threads=1)
    if engine.cache_folder is None:
        engine = replace(engine, cache_folder=default_cache())
    if engine.prefix_budget is None:
        engine = replace(engine, prefix_budget=prefix_budget(cpus_of(engine)))
    opened = open_package(package)
    with _alone(Path(engine.cache_folder or "")):
        if not _is_packed(opened, engine):
            edgeprompt.load(opened.path, options=engine).close()  # it packs the graph, and maps none
    return edgeprompt.load(opened.path, options=engine)


def prefix_budget(cpus: int) -> int:
    """Bytes that an actor keeps of what it computes of prompts: thousands of prompts are asked in any order.

    Actors on all cores together keep an eighth of the memory that is free now.
    """
    from edgeprompt.ort.free_memory import free_memory

    return max(LEAST_PREFIX_BUDGET, (free_memory() or 0) * cpus // (os.cpu_count() or 1) // 8)


def default_cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprompt"


def _is_packed(package: Package, engine: EngineOptions) -> bool:
    from edgeprompt.ort.graph_cache import GraphCache
    from edgeprompt.ort.session import choose_provider, import_onnxruntime

    if choose_provider(engine.provider)[0] != "cpu":
        return True  # nothing is packed for others
    version = import_onnxruntime().__version__
    caches = [GraphCache(Path(engine.cache_folder or ""), graph) for graph in package.manifest.graphs.values()]
    return all(cache.find(version) is not None for cache in caches)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time, where the system can do it."""
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "packing.lock").open("w")
    except (ImportError, OSError):  # Windows; a folder that cannot be written keeps nothing either
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def root_cause(error: BaseException) -> EdgePromptError | None:
    """What edgeprompt raised in an actor, among the errors that Ray puts around it."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or one in seen:
            continue
        if isinstance(one, EdgePromptError):
            return one
        seen.append(one)
        waiting += [getattr(one, "cause", None), one.__cause__, one.__context__]
    # An error of an actor comes without its cause; the traceback of the actor stands in its text.
    told = re.search(rf"^{errors.__name__}\.(\w+): (.+)$", str(error), re.MULTILINE)
    kind = getattr(errors, told[1], None) if told else None
    if told and isinstance(kind, type) and issubclass(kind, EdgePromptError):
        return kind(told[2])
    return None
