"""ONNX Runtime sessions: which provider, how many threads, and beside what they are opened."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprompt.errors import InputError, MissingDependencyError, PackageError, ProviderError
from edgeprompt.options import EngineOptions
from edgeprompt.ort import processor
from edgeprompt.ort.free_memory import free_memory
from edgeprompt.ort.graph_cache import SLOWER_FUSIONS, GraphCache
from edgeprompt.ort.read_ahead import read_ahead
from edgeprompt.ort.threads import AdaptiveThreads
from edgeprompt.package.folder import Package

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
_INSTALL = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-openvino",
    "directml": "onnxruntime-directml",
    "qnn": "onnxruntime-qnn",
}

HEAD_START = 0.02
"""Seconds that sessions have before a tokenizer is read beside them: ONNX Runtime keeps Python's lock while it reads a
graph's file and lets go of it while it makes the session; the tokenizers library keeps it all the time."""

SHARE_OF_FREE = 0.25
"""Share of the free memory that weights may take once more, for a session on fewer threads. Packed ones that a cache
folder keeps are mapped, and take none."""

SPIN_MICROSECONDS = 1000
"""How long idle threads spin between operators and steps before they sleep. ONNX Runtime's default is some tens of
milliseconds, for which a core is busy after every answer and while a session opens."""


@dataclass(frozen=True)
class Session:
    """An open graph. `provider` is the short name of what runs it, `device` where its tensors may live."""

    ort: Any
    provider: str
    device: str
    adaptive: AdaptiveThreads | None = None
    """Sessions of the graph on fewer threads, where nobody said how many."""


class Sessions:
    """The sessions of a package's graphs, each opened in a thread of its own while the caller does something else."""

    def __init__(self, package: Package, options: EngineOptions) -> None:
        """Begin.

        Raises:
            MissingDependencyError: neither onnxruntime nor onnxruntime-gpu is installed.
        """
        graphs = package.manifest.graphs
        caches: dict[str, GraphCache | None] = dict.fromkeys(graphs)
        weights: list[Path] = []
        for key, graph in graphs.items():
            cache = None if options.cache_folder is None else GraphCache(Path(options.cache_folder), graph)
            packed = None if cache is None else cache.newest_weights()
            weights += [packed] if packed is not None else [package.path / name for name in graph.data]
            caches[key] = cache
        read_ahead(weights)
        import_onnxruntime()
        self._begun = time.monotonic()
        pool = ThreadPoolExecutor(len(graphs), "edgeprompt-session")
        self._found: dict[str, Future[Session]] = {
            key: pool.submit(_open_graph, package, key, options, caches[key]) for key in graphs
        }
        pool.shutdown(wait=False)

    def __getitem__(self, key: str) -> Session:
        """The session of the graph "model", "encoder" or "decoder"; waits until it is open.

        Raises:
            PackageError, ProviderError, InputError: as `open_session`.
        """
        return self._found[key].result()

    def abandon(self) -> None:
        """In a forked child: let nothing free a session, whose threads are not there and would be waited for.

        ONNX Runtime's own threads are waited for when the process ends, behind Python's end (its library's static
        destructors), so these are skipped: handlers of `on_exit` run last in, first out. Only glibc has it.
        """
        for future in self._found.values():
            if future.done() and future.exception() is None:
                found = future.result()
                for ort in [found.ort] if found.adaptive is None else found.adaptive.sessions:
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(ort))
        libc = ctypes.CDLL(None)
        if hasattr(libc, "on_exit") and hasattr(libc, "fcloseall"):
            libc.on_exit(libc._exit, None)
            libc.on_exit(libc.fcloseall, None)

    def give_head_start(self) -> None:
        """Wait until `HEAD_START` is over."""
        wait(self._found.values(), timeout=max(0.0, self._begun + HEAD_START - time.monotonic()))


def _open_graph(package: Package, key: str, options: EngineOptions, cache: GraphCache | None) -> Session:
    path, spinning = package.graph(key), options.spinning
    threads = options.threads if options.workers is None else 1
    found = open_session(path, provider=options.provider, threads=threads, spinning=spinning, cache=cache)
    cores = processor.cores()
    if threads is not None or found.provider != "cpu" or cores < 2:
        return found
    weights = sum((package.path / name).stat().st_size for name in package.manifest.graphs[key].data)

    def fewer(count: int) -> Any:
        free = free_memory()
        if free is not None and weights > free * SHARE_OF_FREE and not (cache is not None and cache.is_packed()):
            return None
        return open_session(path, provider="cpu", threads=count, spinning=spinning, cache=cache).ort

    return replace(found, adaptive=AdaptiveThreads(found.ort, cores, fewer))


def graph_inputs(session: Any) -> list[Any]:
    """All that a session can be fed: required inputs, and those with a (prompt_input "optional")."""
    return [*session.get_inputs(), *session.get_overridable_initializers()]


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: neither onnxruntime nor onnxruntime-gpu is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "onnxruntime is not installed: pip install 'edgeprompt[cpu]' or 'edgeprompt[gpu]'"
        ) from error
    return onnxruntime


def choose_provider(provider: str) -> tuple[str, str]:
    """(short name, ONNX Runtime's name) for "auto", a short name, or ONNX Runtime's own name.

    "auto" is CUDA where it is there, else the CPU.

    Raises:
        ProviderError: asked for and not available; names what is, and how to install it.
    """
    available = import_onnxruntime().get_available_providers()
    short = {full: name for name, full in _PROVIDERS.items()}
    if provider == "auto":
        provider = "cuda" if _PROVIDERS["cuda"] in available else "cpu"
    full = _PROVIDERS.get(provider.lower(), provider)
    if full not in available:
        there = ", ".join(short.get(name, name) for name in available)
        package = _INSTALL.get(provider.lower())
        fix = f"pip install {package}" if package else "install an onnxruntime that has it"
        raise ProviderError(f"provider {provider!r} is not available here (available: {there}); {fix}")
    return short.get(full, full), full


def open_session(
    path: str | os.PathLike[str],
    *,
    provider: str = "auto",
    threads: int | None = None,
    spinning: bool = True,
    cache: GraphCache | None = None,
) -> Session:
    """Open a graph.

    Args:
        path: the ONNX file.
        provider: "auto", "cpu", "cuda", another provider's short or full name.
        threads: intra-op threads; None lets ONNX Runtime take one per physical core.
        spinning: whether idle threads spin between operators (faster answers, busier cores).
        cache: where this graph is kept as packed for the CPU; None packs it at every start.

    Raises:
        ProviderError: the provider is not there, or did not start.
        PackageError: the graph does not load.
        InputError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1, or None for one per core")
    name, full = choose_provider(provider)
    providers = [full] if name == "cpu" else [full, _PROVIDERS["cpu"]]
    session = _open_cached(cache, path, threads, spinning) if cache is not None and name == "cpu" else None
    try:
        if session is None:
            options = _options(threads, spinning)
            slower = SLOWER_FUSIONS if name == "cpu" else []
            session = import_onnxruntime().InferenceSession(
                str(path), options, providers=providers, disabled_optimizers=slower
            )
    except Exception as error:  # onnxruntime raises its own family without a common base
        text = str(error).splitlines()[0]
        if name != "cpu" and full in text:
            raise ProviderError(f"provider {name!r} failed to start: {text}") from error
        raise PackageError(f"cannot load graph {Path(path).name!r}: {text}") from error
    if full not in session.get_providers():
        raise ProviderError(
            f"provider {name!r} was asked for and did not start (running: {', '.join(session.get_providers())}); "
            "check its driver and libraries, or use provider='cpu'"
        )
    return Session(session, name, "cuda" if name in ("cuda", "tensorrt") else "cpu")


def _options(threads: int | None, spinning: bool) -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS if spinning else 0))
    # Signed 8-bit weights are the quickest with VNNI and saturate on x86 without it, where this makes them unsigned.
    options.add_session_config_entry("session.x64quantprecision", "1" if processor.saturates() else "0")
    return options


def _open_cached(cache: GraphCache, path: str | os.PathLike[str], threads: int | None, spinning: bool) -> Any:
    """A session on the kept graph, which is written first where there is none; None where neither can be done."""
    ort = import_onnxruntime()
    kept, session = cache.find(ort.__version__), None
    try:
        if kept is not None:
            options = _options(threads, spinning)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised
            return ort.InferenceSession(str(kept), options, providers=[_PROVIDERS["cpu"]])
        for packed in (True, False):
            if cache.find(ort.__version__) is None:
                options, session = _options(threads, spinning), None
                with cache.writing(ort.__version__, options, packed=packed):
                    session = ort.InferenceSession(
                        str(path), options, providers=[_PROVIDERS["cpu"]], disabled_optimizers=SLOWER_FUSIONS
                    )
        return session
    except Exception as error:  # onnxruntime raises its own family without a common base
        cache.drop(ort.__version__, str(error).splitlines()[0])
        return None
