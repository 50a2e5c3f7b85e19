"""`--precision auto`: export every candidate, ask each the same on this device, keep the quickest that answers well."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeprompt.base.load import LoadedBase, load_base
from edgeprompt.base.memory import to_export
from edgeprompt.errors import CapacityError, ExportError, InputError, UnsupportedError, ValidationError
from edgeprompt.package.files import atomic_folder, sha256_file
from edgeprompt.package.outputs import PACKAGE, check_output
from edgeprompt.prompts.file import PromptFile, load_prompt
from exporters.contract import Progress
from exporters.decoder_only import why_uncalibrated
from exporters.export import ExportReport, export_model, is_onnx_folder
from exporters.validate.quality import check_calibrated, check_calibration

if TYPE_CHECKING:
    from edgeprompt.evaluation.metrics import Score
    from edgeprompt.request import Generation, Request
    from edgeprompt.runtime import Runtime

REFERENCE = "fp32"
FAST_BLOCK = 128
"""Block size of the second int4: quicker than blocks of 32, for prompts that were tuned for it."""
CANDIDATES = {
    "cpu": ((REFERENCE, 32), ("int8", 32), ("int4", 32), ("int4", FAST_BLOCK)),
    "cuda": ((REFERENCE, 32), ("fp16", 32), ("int4", 32), ("int4", FAST_BLOCK)),
}
"""(precision, block_size) for each provider."""
ROUNDS = 5
TEXTS = 32
"""Rows of the data that are timed as one batch, where answers are labels or spans."""
GENERATIONS = 4
"""Rows that are timed one after another, where answers are generated."""


@dataclass
class Candidate:
    """One precision and block size: its package, what it answered, and how long that took."""

    precision: str
    block_size: int = 32
    report: ExportReport | None = None
    failure: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    """Seconds from a text to its label, or to the first token of its answer; one value a round."""
    cost: list[float] = field(default_factory=list)
    """Seconds a text, or a generated token, the first included; one value a round. What is chosen by."""

    def facts(self, reference: Candidate, tolerance: float) -> dict[str, Any]:
        """One line of the table as plain data."""
        what: dict[str, Any] = {"precision": self.precision}
        if self.precision == "int4":
            what["block_size"] = self.block_size
        if self.report is None:
            return {**what, "verdict": f"failed: {self.failure}"}
        what |= {"quality": self.report.manifest.quality, "quality_gate": self.report.manifest.quality_gate}
        return {
            **what,
            "size_bytes": self.report.size_bytes,
            "first_ms": 1000 * statistics.median(self.first),
            "cost_ms": 1000 * statistics.median(self.cost),
            "scores": {
                name: {
                    "metric": score.metric,
                    "value": score.value,
                    "standard_error": score.standard_error,
                    "points_below": self.below(name, reference),
                }
                for name, score in self.scores.items()
            },
            "verdict": "slower" if self.holds(reference, tolerance) else "below the bound",
        }

    def below(self, prompt: str, reference: Candidate) -> float:
        """Points of the metric that the reference is better by."""
        return 100 * (reference.scores[prompt].value - self.scores[prompt].value)

    def holds(self, reference: Candidate, tolerance: float) -> bool:
        """Whether every prompt is within `tolerance` points of the reference."""
        return self.report is not None and all(self.below(name, reference) <= tolerance for name in self.scores)


def export_best(
    base: str | os.PathLike[str] | LoadedBase,
    out: str | os.PathLike[str],
    *,
    prompts: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str],
    tolerance: float = 1.0,
    route: str = "auto",
    provider: str = "cpu",
    force: bool = False,
    prompt_input: str = "required",
    calibration: Any = None,
    allow_quality_loss: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Export in the precision that serves `prompts` fastest on this device and loses at most `tolerance` points.

    Each of `CANDIDATES` is exported into a hidden folder beside `out`, evaluated on `data`, and timed on its first
    records in alternating rounds. A candidate qualifies if no prompt loses more than `tolerance` points against fp32.
    The fastest one that qualifies becomes `out`. Its manifest has all measurements in `extra["precision_choice"]`.

    Args:
        base: Hugging Face id, local folder, `.gguf` file, or a base that is loaded already.
        out: The package's folder; must not exist unless `force`.
        prompts: Prompt files of one task, at least one; they are put into the package.
        data: Records on which the prompts are evaluated: a file or a dataset id with the columns that `tune` reads. Do
            not use the records on which you report results.
        tolerance: Points (hundredths) of the task's metric that may be lost against fp32.
        route: As for `export_model`.
        provider: As for `export_model`; the candidates are measured on it.
        force: Replace an older package, or an empty folder, at `out`, once the new package is complete.
        prompt_input: As for `export_model`.
        calibration: As for `export_model`.
        allow_quality_loss: Also try candidates that are further from the base than `export_model` allows.
        progress: Called with a stage's name and the fraction done.

    Raises:
        InputError: no prompt, a tolerance that is no number, prompts of several tasks, a base of graphs, which has its
            precision already, or a text that is in `calibration` and in `data`.
        DataError: a record lacks what the prompts need.
        ExportError: fp32 cannot be exported, or a file cannot be written; nothing was left behind.
    """
    from edgeprompt.bench.device import describe_device

    tell = progress or (lambda stage, fraction: None)
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"tolerance is {tolerance}; it must be a number of at least 0")
    if not isinstance(base, LoadedBase) and (route == "onnx" or is_onnx_folder(base)):
        raise InputError("graphs that others exported have their precision already; leave out --precision auto")
    sources = (base, data, *prompts)
    check_output(out, PACKAGE, force=force, sources=sources)
    files = {Path(path): load_prompt(path) for path in prompts}
    check_calibration(calibration, data)
    judge = _Judge(files, str(data))
    tell("load", 0.0)
    loaded = base if isinstance(base, LoadedBase) else load_base(base, need=to_export("fp32"), mapped=True)
    check_calibrated(calibration, loaded)
    wanted = CANDIDATES[provider]
    step = 0.9 / (len(wanted) + 1)
    with atomic_folder(out, PACKAGE, force=force, sources=sources) as folder, contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{Path(out).name}.", suffix=".partial")
            )
        )
        candidates = []
        for number, (precision, block_size) in enumerate(wanted):
            tell(f"export {precision}", number * step)
            found = Candidate(precision, block_size)
            unused = calibration is None or why_uncalibrated(loaded, precision, block_size)
            try:
                found.report = export_model(
                    loaded, scratch / str(number), precision=precision, block_size=block_size, route=route,
                    provider=provider, prompts=prompts, prompt_input=prompt_input,
                    calibration=None if unused else calibration,
                    allow_quality_loss=allow_quality_loss, allow_other_weights=True,
                )  # fmt: skip
            except (CapacityError, UnsupportedError, ValidationError, ExportError) as error:
                if precision == REFERENCE or isinstance(error.__cause__, OSError):
                    raise
                found.failure = str(error)
            candidates.append(found)
        tell("measure", len(wanted) * step)
        judge.measure(candidates, provider)
        reference = candidates[0]
        best = min(
            (found for found in candidates if found.holds(reference, tolerance)),
            key=lambda found: statistics.median(found.cost),
        )
        table = [found.facts(reference, tolerance) for found in candidates]
        table[candidates.index(best)]["verdict"] = "chosen"
        assert best.report is not None
        choice = {
            "tolerance": tolerance,
            "cost": "token" if judge.generates else "text",
            "data": Path(data).name,
            "data_sha256": sha256_file(data) if Path(data).is_file() else None,
            "rows": judge.rows,
            "device": describe_device(),
            "candidates": table,
        }
        manifest = best.report.manifest
        manifest = dataclasses.replace(manifest, extra={**manifest.extra, "precision_choice": choice})
        for file in best.report.path.iterdir():
            file.rename(folder / file.name)
        manifest.write(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tell("done", 1.0)
    return ExportReport(Path(out), manifest, size)


class _Judge:
    """What candidates are asked: all rows for the metric, the first few against the clock."""

    def __init__(self, files: Mapping[Path, PromptFile], data: str) -> None:
        from edgeprompt.evaluation.data import read_records
        from edgeprompt.evaluation.evaluate import Columns, check_task

        if not files:
            raise InputError("a precision is judged with the prompts it will serve: give at least one --prompt")
        self._files, self._data, self._columns = files, data, Columns()
        self._prompts = {prompt.name: prompt for prompt in files.values()}
        if len(self._prompts) < len(files):
            raise InputError("two prompts have one name; give one, or tune the other under another name")
        check_task(self._prompts, None)
        first = next(iter(self._prompts.values()))
        if first.head_spec is not None and first.head_spec.problem_type == "regression":
            raise InputError("--precision auto bounds points of a metric, which numbers do not have; export each")
        self.generates = first.task == "generate"
        self.rows = 0
        for self.rows, row in enumerate(
            read_records(data), 1
        ):  # what is wrong with the data is said before the exports
            for prompt in self._prompts.values():
                self._columns.references(prompt, row, self.rows)

    def measure(self, candidates: Sequence[Candidate], provider: str) -> None:
        """Fill in scores and times."""
        import edgeprompt
        from edgeprompt.evaluation.data import read_records
        from edgeprompt.evaluation.evaluate import evaluate
        from edgeprompt.request import GenerationOptions

        with contextlib.ExitStack() as stack:
            runtimes = []
            for found in candidates:
                if found.report is None:
                    continue
                runtime = stack.enter_context(
                    edgeprompt.load(
                        found.report.path,
                        provider=provider,
                        options=edgeprompt.EngineOptions(reuse_texts=False),  # the same texts are timed again
                    )
                )
                for file in self._files:
                    runtime.add_prompt(file, allow_other_weights=True)
                found.scores = evaluate(
                    runtime, self._prompts, iter(read_records(self._data)), self._columns, metric=None,
                    options=GenerationOptions(),
                )  # fmt: skip
                runtimes.append((found, runtime))
            requests = self._requests()
            for number in range(1 + ROUNDS):
                turn = number % len(runtimes)
                for found, runtime in (*runtimes[turn:], *runtimes[:turn]):
                    first, cost = self._time(runtime, requests)
                    if number:  # the first round warms up
                        found.first.append(first)
                        found.cost.append(cost)

    def _requests(self) -> dict[str, list[Request]]:
        from edgeprompt.evaluation.data import read_records
        from edgeprompt.request import Request

        rows = list(islice(read_records(self._data), GENERATIONS if self.generates else TEXTS))
        return {
            name: [Request(self._columns.fields(prompt, row, at), name, truncate=True) for at, row in enumerate(rows)]
            for name, prompt in self._prompts.items()
        }

    def _time(self, runtime: Runtime, requests: Mapping[str, Sequence[Request]]) -> tuple[float, float]:
        """Seconds to the first label or token, and seconds a text or token; means over the prompts."""
        first, cost = [], []
        for asked in requests.values():
            if self.generates:
                timings = [cast("Generation", runtime.run([request])[0]).timings for request in asked]
                first.append(statistics.fmean(one.ttft for one in timings))
                cost.append(sum(one.total for one in timings) / sum(one.new_tokens for one in timings))
            else:
                first.append(_seconds(runtime, asked[:1]))
                cost.append(_seconds(runtime, asked) / len(asked))
        return statistics.fmean(first), statistics.fmean(cost)


def _seconds(runtime: Runtime, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    runtime.run(requests)
    return time.perf_counter() - started
