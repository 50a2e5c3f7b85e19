"""Requests on a decoder's graph: prefilled one by one, in chunks, then decoded together.

A step prefills a chunk of the next request, and runs one decode step for all sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeprompt.engines.decoder.graph import DecoderGraph
from edgeprompt.engines.decoder.prefixes import Prefixes
from edgeprompt.engines.scheduler import Job
from edgeprompt.prompts.registry import LoadedPrompt

Floats = npt.NDArray[np.float32]


class Decision(Protocol):
    """What a request makes of its logits."""

    length: int
    """Positions of the sequence that count; a step may lower it to go back."""

    def advance(self, logits: Floats) -> int | None:
        """Take the logits [vocab_size] behind the last token; the next token to run, or None when done."""

    def result(self) -> Any:
        """The answer, once done."""


class DecoderJob(Job):
    """A request on a decoder."""

    def __init__(
        self,
        prompt: LoadedPrompt | None,
        ids: Sequence[int],
        decision: Decision,
        *,
        new_tokens: int = 0,
        states: list[Floats] | None = None,
        vocab_size: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Prepare.

        Args:
            prompt: which it runs on.
            ids: what to prefill behind the prompt's prefix.
            decision: what becomes of the logits.
            new_tokens: most tokens that follow.
            states: gets the hidden states behind every piece of `ids`; None: nobody asks for them.
            vocab_size: of the base.
            timeout: seconds from now.
        """
        super().__init__(timeout, decision.result)
        self.decision, self.states = decision, states
        self.prefix = prompt if prompt is not None and prompt.is_prefix and prompt.num_virtual_tokens else None
        """Whose keys and values stand in front."""
        self.table = prompt if prompt is not None and prompt.rows and not prompt.is_prefix else None
        """Whose rows virtual ids among `ids` index."""
        self.cut = 0
        """Positions at the prefix's end that are run again, for their logits: where the text is empty."""
        count = 0 if self.prefix is None else self.prefix.num_virtual_tokens
        self.total = count + len(ids) + new_tokens
        """Most positions that it may reach."""
        if not ids and vocab_size and self.prefix is not None:
            self.table, self.cut, ids = self.prefix, 1, [vocab_size + count - 1]
        self.ids = ids
        self.token = 0
        self.filled = 0
        """How many of `ids` are prefilled."""


class DecoderLane:
    """Runs jobs on one graph with a cache of its own (`edgeprompt.engines.scheduler.Lane`)."""

    def __init__(self, graph: DecoderGraph, prefixes: Prefixes, *, max_rows: int) -> None:
        self.graph, self._prefixes, self._max_rows = graph, prefixes, max_rows
        self._rows: list[DecoderJob] = []
        """Sequences of the decode step, by slot."""
        self._filling: DecoderJob | None = None
        """The job that is being prefilled, in the slot behind them."""

    @property
    def running(self) -> Sequence[DecoderJob]:
        """Jobs that were taken and have not ended."""
        return [*self._rows, self._filling] if self._filling is not None else [*self._rows]

    def take(self, waiting: deque[DecoderJob]) -> bool:
        """Take the next job, once there is room for it."""
        if self._filling is not None or len(self._rows) >= self._max_rows:
            return False
        if self._rows and not self.graph.fits(len(self._rows) + 1, self._longest(waiting[0])):
            return False
        self._filling = waiting.popleft()
        return True

    def step(self) -> None:
        """Prefill a chunk of one request, then run one token of every other."""
        if self._filling is not None:
            self._prefill(self._filling)
        if self._rows:
            self._decode()

    def drop(self, job: DecoderJob, error: BaseException) -> None:
        """End a job with an error."""
        if job is self._filling:
            self._filling = None
            job.fail(error)
        else:
            self._leave(self._rows.index(job), error)

    def idle(self) -> None:
        """Give back what a long request took."""
        self.graph.idle()

    def _longest(self, job: DecoderJob) -> int:
        return max(job.total, *(row.total for row in self._rows), 0)

    def _prefill(self, job: DecoderJob) -> None:
        slot, graph, decision = len(self._rows), self.graph, job.decision
        try:
            if not job.filled:
                total = self._longest(job)
                prefix = None if job.prefix is None else self._prefixes.find(job.prefix, graph, slot, total)
                if prefix is not None and job.cut:
                    prefix = prefix[:, :, : -job.cut]
                decision.length = 0 if prefix is None else prefix.shape[2]
                if not job.ids:  # the prefix alone was asked for
                    self._filling = None
                    job.finish()
                    return
                graph.place(slot, prefix, total, slot)
            piece = job.ids[job.filled : job.filled + graph.chunk]
            table = None if job.table is None else self._prefixes.rows(job.table)
            logits = graph.prefill(slot, piece, decision.length, table, job.states)
            job.filled += len(piece)
            decision.length += len(piece)
            if job.filled < len(job.ids):
                return
            self._filling = None
            token = decision.advance(logits)
        except Exception as failure:
            self._filling = None
            job.fail(failure)
            return
        if token is None:
            job.finish()
            return
        job.token = token
        self._rows.append(job)

    def _decode(self) -> None:
        """One step for all sequences. If it fails, each is tried alone, so that only the culprit fails."""
        rows = self._rows
        try:
            logits = list(self.graph.decode([job.token for job in rows], [job.decision.length for job in rows]))
        except Exception:
            logits = []
        for slot in reversed(range(len(rows))):
            job = rows[slot]
            try:
                row = logits[slot] if logits else self.graph.decode_one(slot, job.token, job.decision.length)
                job.decision.length += 1
                token = job.decision.advance(row)
            except Exception as error:
                self._leave(slot, error)
                continue
            if token is None:
                self._leave(slot)
            else:
                job.token = token

    def _leave(self, slot: int, error: BaseException | None = None) -> None:
        """Take a sequence out; the last one takes its slot."""
        job, last = self._rows[slot], len(self._rows) - 1
        if slot != last:
            self.graph.move(last, slot, self._rows[last].decision.length)
            self._rows[slot] = self._rows[last]
        if self._filling is not None and self._filling.filled:
            self.graph.move(last + 1, last, self._filling.decision.length)
        self._rows.pop()
        if error is None:
            job.finish()
        else:
            job.fail(error)
