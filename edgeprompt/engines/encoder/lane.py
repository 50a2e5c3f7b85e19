"""Requests on an encoder's graph: a step answers a batch of similar length."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import numpy.typing as npt

from edgeprompt.engines.encoder.batch import Row, make_feeds, split_batches
from edgeprompt.engines.scheduler import Job
from edgeprompt.ort.session import Session, graph_inputs, import_onnxruntime
from edgeprompt.ort.threads import AdaptiveThreads
from edgeprompt.package.manifest import Manifest

PIECE = 1024
"""Waiting requests that are sorted by length together."""
Outputs: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""A row's own, without the batch's axis; positions may be padded on the right."""
_BATCHES = count()


class EncoderJob(Job):
    """A request on an encoder."""

    def __init__(
        self, length: int, prefix_length: int, row: Callable[[], Row], outputs: Sequence[str], timeout: float | None
    ) -> None:
        """Prepare.

        Args:
            length: tokens of the request, virtual ones included.
            prefix_length: positions of its deep prompt.
            row: reads the prompt's tensors and makes the batch's row; called when the batch is made.
            outputs: names of the graph's outputs that are needed.
            timeout: seconds from now.
        """
        super().__init__(timeout, self._read)
        self.length, self.prefix_length, self.row, self.outputs = length, prefix_length, row, outputs
        self.read: Callable[[Row, Outputs], Any] = lambda row, outputs: outputs
        """Makes the answer of the row and its outputs."""
        self.batch: int | None = None
        """Which requests it runs with, once that is decided."""
        self.found: tuple[Row, Outputs] | None = None

    def _read(self) -> Any:
        assert self.found is not None
        return self.read(*self.found)


@dataclass
class EncoderGraph:
    """An open graph. Safe from any thread, except where the number of its own threads adapts."""

    ort: Any
    """ONNX Runtime's session for the next run."""
    adaptive: AdaptiveThreads | None
    manifest: Manifest
    inputs: frozenset[str]
    outputs: frozenset[str]
    run_options: Any

    @staticmethod
    def open(session: Session, manifest: Manifest) -> EncoderGraph:
        """Take the graph's session."""
        options = import_onnxruntime().RunOptions()
        # Logits over the vocabulary cost as much as a layer; they are computed only where a row asks for them.
        options.only_execute_path_to_fetches = True
        return EncoderGraph(
            session.ort,
            session.adaptive,
            manifest,
            frozenset(value.name for value in graph_inputs(session.ort)),
            frozenset(value.name for value in session.ort.get_outputs()),
            options,
        )

    def run(self, rows: Sequence[Row], wanted: Sequence[str]) -> list[Outputs]:
        """Outputs of every row of one batch."""
        feeds = make_feeds(rows, self.manifest, self.inputs)
        began = time.perf_counter(), time.process_time()
        found = self.ort.run(wanted, feeds, self.run_options)
        if self.adaptive is not None:
            tokens = len(rows) * max(row.length for row in rows)
            self.ort = self.adaptive.ran(("batch", tokens.bit_length()), tokens, began)
        return [dict(zip(wanted, (value[at] for value in found), strict=True)) for at in range(len(rows))]


class EncoderLane:
    """Runs batches on one graph (`edgeprompt.engines.scheduler.Lane`)."""

    def __init__(self, graph: EncoderGraph) -> None:
        self._graph = graph
        self._jobs: list[EncoderJob] = []

    @property
    def running(self) -> Sequence[EncoderJob]:
        """The batch at hand."""
        return [*self._jobs]

    def take(self, waiting: deque[EncoderJob]) -> bool:
        """Take the next batch; what waits is sorted by length first, a piece at a time."""
        if self._jobs:
            return False
        if waiting[0].batch is None:
            piece = [waiting.popleft() for _ in range(min(PIECE, len(waiting)))]
            batches = split_batches([job.length for job in piece], [job.prefix_length for job in piece])
            for indices in reversed(batches):
                number = next(_BATCHES)
                for index in reversed(indices):
                    piece[index].batch = number
                    waiting.appendleft(piece[index])
        number = waiting[0].batch or 0
        while waiting and waiting[0].batch == number:
            self._jobs.append(waiting.popleft())
        return True

    def step(self) -> None:
        """Answer the batch. If it fails, each request is tried alone, so that only the culprit fails."""
        jobs = self._jobs
        if jobs and not self._run(jobs):
            for job in jobs if len(jobs) > 1 else ():
                self._run([job])
        self._jobs = []

    def drop(self, job: EncoderJob, error: BaseException) -> None:
        """End a job with an error."""
        self._jobs.remove(job)
        job.fail(error)

    def idle(self) -> None:
        """Nothing is kept."""

    def _run(self, jobs: Sequence[EncoderJob]) -> bool:
        try:
            rows = [job.row() for job in jobs]
            found = self._graph.run(rows, sorted({name for job in jobs for name in job.outputs}))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].fail(error)
            return False
        for job, row, outputs in zip(jobs, rows, found, strict=True):
            job.found = row, outputs
            job.finish()
        return True
