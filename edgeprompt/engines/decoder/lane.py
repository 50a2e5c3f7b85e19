"""Requests on a decoder's graph: prefilled one by one, in chunks, then decoded together.

A step prefills a chunk of the next request, and runs one decode step for all that are beyond. A request with several
sequences (label words) has them in the slots behind all others, and steps of its own, until it is done.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgeprompt.decoding.drafts import StepCosts
from edgeprompt.decoding.strategies import Move, Strategy
from edgeprompt.engines.decoder.graph import BLOCK, DecoderGraph
from edgeprompt.engines.decoder.prefixes import Prefixes
from edgeprompt.engines.scheduler import Job
from edgeprompt.ort.kv_cache import Part
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.request import Clock

Floats = npt.NDArray[np.float32]


class DecoderJob(Job):
    """A request on a decoder."""

    def __init__(
        self,
        prompt: LoadedPrompt | None,
        ids: Sequence[int],
        strategy: Strategy,
        *,
        new_tokens: int = 0,
        states: list[Floats] | None = None,
        every_state: bool = False,
        clock: Clock | None = None,
        vocab_size: int = 0,
        timeout: float | None = None,
        drafts: Callable[[], tuple[Sequence[int], float]] | None = None,
    ) -> None:
        """Prepare.

        Args:
            prompt: which it runs on.
            ids: what to prefill behind the prompt's prefix.
            strategy: what becomes of the logits.
            new_tokens: most tokens that follow.
            states: gets the hidden states behind the pieces of `ids` that are run; None: nobody asks for them.
            every_state: whether all of `ids` must be run for that, though their keys and values are resident.
            clock: is told how many of `ids` were resident, and how many tokens were drafted.
            vocab_size: of the base.
            timeout: seconds from now.
            drafts: tokens that may come next, and the share of them that is expected to be right; None: where its
                sequence runs alone, its steps have one position.
        """
        super().__init__(timeout, strategy.result)
        self.strategy, self.states, self.every_state, self.clock = strategy, states, every_state, clock
        self.drafts = drafts
        self.prefix = prompt if prompt is not None and prompt.is_prefix and prompt.num_virtual_tokens else None
        """Whose keys and values stand in front."""
        self.table = prompt if prompt is not None and prompt.virtual_ids and not prompt.is_prefix else None
        """Whose rows, or keys and values, virtual ids among `ids` index."""
        self.vocab_size = vocab_size
        self.cut = 0
        """Positions at the prefix's end that are run again, for their logits: where the text is empty."""
        count = 0 if self.prefix is None else self.prefix.num_virtual_tokens
        self.total = count + len(ids) + new_tokens
        """Most positions that it may reach."""
        if not ids and vocab_size and self.prefix is not None:
            self.table, self.cut, ids = self.prefix, 1, [vocab_size + count - 1]
        self.ids = ids
        infix = self.table is not None and self.table.is_infix
        given = [token >= vocab_size for token in ids] if infix else []
        self.edges = [place for place in range(1, len(given)) if given[place] != given[place - 1]]
        """Where keys and values that stand among `ids` begin and end: they are pieces of their own."""
        self.filled = -1
        """How many of `ids` are prefilled; -1 before it begins."""
        self.blocks: list[bytes] = []
        """Names of the blocks of `ids`."""
        self.kept = 0
        """How many of them are resident."""
        self.slot = 0
        """Where it is prefilled."""
        self.length = 0
        """Positions that its sequences have."""
        self.token = 0
        """What its one sequence runs next."""
        self.move: Move | None = None
        """What its several sequences run next."""
        self.text_length = 0
        """Positions that all of them have in common."""


class DecoderLane:
    """Runs jobs on one graph with a cache of its own (`edgeprompt.engines.scheduler.Lane`)."""

    def __init__(self, graph: DecoderGraph, prefixes: Prefixes, *, max_rows: int, costs: StepCosts) -> None:
        self.graph, self._prefixes, self._max_rows, self._costs = graph, prefixes, max_rows, costs
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
        count, job = len(self._rows), waiting[0]
        if self._filling is not None or count >= self._max_rows:
            return False
        rows, first = (1, count) if job.strategy.width > 1 else (count + 1, 0)
        if count and not self.graph.fits(rows, self._longest(job), first):
            return False
        self._filling = waiting.popleft()
        job.slot = count
        return True

    def step(self) -> None:
        """Prefill a chunk of one request, or step its sequences, then run one token of every other."""
        job = self._filling
        if job is not None:
            try:
                ended = self._branch(job) if job.move is not None else self._prefill(job)
            except Exception as failure:
                self.drop(job, failure)
            else:
                if ended:
                    self._end_filling()
                    job.finish()
        if self._rows:
            self._decode()

    def drop(self, job: DecoderJob, error: BaseException) -> None:
        """End a job with an error."""
        if job is self._filling:
            self._end_filling()
            job.fail(error)
        else:
            self._leave(self._rows.index(job), error)

    def idle(self) -> None:
        """Give back what a long request took."""
        self.graph.idle()

    def _longest(self, job: DecoderJob) -> int:
        return max(job.total, *(row.total for row in self._rows), 0)

    def _end_filling(self) -> None:
        assert self._filling is not None
        self.graph.release(self._filling.slot)
        self._filling = None

    def _prefill(self, job: DecoderJob) -> bool:
        """Run a chunk of the text; whether that ends the job."""
        graph, strategy = self.graph, job.strategy
        if job.filled < 0:
            self._begin(job)
            if not job.ids:  # the prefix alone was asked for
                return True
        # Pieces end where they would if nothing were resident, so that their rows are the same to the last bit.
        piece = job.ids[job.filled : self._piece(job, job.filled)[1]]
        logits = None
        if job.table is not None and job.table.is_infix and piece[0] >= job.vocab_size:
            first = piece[0] - job.vocab_size
            graph.write(job.slot, job.length, self._prefixes.infix(job.table)[:, :, first : first + len(piece)])
        else:
            table = None if job.table is None or job.table.is_infix else self._prefixes.rows(job.table)
            logits = graph.prefill(job.slot, piece, job.length, table, job.states)
        job.filled += len(piece)
        job.length += len(piece)
        done = job.filled // BLOCK
        start = job.length - job.filled + job.kept * BLOCK
        self._prefixes.keep(job.blocks[:done], done - job.kept, graph, job.slot, start, job.prefix or job.table)
        job.kept = done
        if job.filled < len(job.ids):
            return False
        assert logits is not None  # text stands behind keys and values
        several = strategy.width > 1
        if several:
            self._spread(job)
        move = strategy.advance(logits[None])
        if move is None:
            return True
        if several:
            job.move = move
        else:
            self._join(job, move)
        return False

    def _begin(self, job: DecoderJob) -> None:
        """Start a job on what is resident of its prompt and text."""
        graph, total, parts = self.graph, self._longest(job), list[Part]()
        if job.prefix is not None:
            prefix = self._prefixes.find(job.prefix, graph, job.slot, total)
            parts = [(job.prefix.sha256.encode(), prefix[:, :, : -job.cut] if job.cut else prefix)]
            job.length = parts[0][1].shape[2]
        job.blocks = self._prefixes.names(job.prefix, job.table, job.ids)
        if not job.every_state:
            there = self._prefixes.cache.find_blocks(job.blocks)
            most = next(n for n in range(len(there), -1, -1) if self._may_begin(job, n * BLOCK))
            parts += zip(job.blocks[:most], there, strict=False)
        job.kept = len(parts) - (job.prefix is not None)
        job.filled = job.kept * BLOCK
        job.length += job.filled
        if job.clock is not None:
            job.clock.reused_tokens = job.filled
        if job.ids:
            graph.place(job.slot, parts, total, job.slot)

    def _piece(self, job: DecoderJob, filled: int) -> tuple[int, int]:
        """Where the piece of a job's ids that goes on at `filled` begins, and where it ends."""
        start, edge = filled - filled % self.graph.chunk, bisect_right(job.edges, filled)
        end = min(start + self.graph.chunk, len(job.ids), *job.edges[edge : edge + 1])
        return max(start, *job.edges[max(0, edge - 1) : edge], 0), end

    def _may_begin(self, job: DecoderJob, filled: int) -> bool:
        """Whether what follows `filled` ids is computed to the same last bit as if nothing were resident.

        Kernels add up in another order for a row alone, and attention takes the rows of a piece in groups. So the
        piece's last row must be alone in its group in both cases or in neither.
        """
        start, end = self._piece(job, filled)
        groups, done, whole, left = self.graph.row_groups, filled - start, end - start, end - filled
        if done == 0:
            return left > 0 or filled == 0
        alone = any(rows % group == 1 for rows in (left, whole) for group in groups)
        return left > 1 and (not alone or done % groups[-1] == 0)

    def _join(self, job: DecoderJob, move: Move) -> None:
        """Decode a job with the others from now on."""
        (job.token,), slot = move[0], len(self._rows)
        if job.slot != slot:  # others left meanwhile
            self.graph.move(job.slot, slot, job.length)
        self._rows.append(job)
        self._filling = None

    def _spread(self, job: DecoderJob) -> None:
        """Give a job a slot for each of its sequences, as many as there is memory for."""
        longest, strategy = self._longest(job), job.strategy
        while strategy.width > strategy.least_width and not self.graph.fits(strategy.width, longest, job.slot):
            strategy.width -= 1
        self.graph.spread(job.slot, strategy.width, job.length, longest)
        job.text_length = job.length

    def _branch(self, job: DecoderJob) -> bool:
        """Run one token of each of a job's sequences; whether that ends the job."""
        assert job.move is not None
        tokens, parents = job.move
        self.graph.branch(job.slot, parents, job.text_length, job.length)
        if parents is None:
            job.length = job.text_length
        logits = self.graph.decode(tokens, [job.length] * len(tokens), job.slot)
        job.length += 1
        job.move = job.strategy.advance(logits)
        return job.move is None

    def _decode(self) -> None:
        """One step for all sequences. If it fails, each is tried alone, so that only the culprit fails."""
        rows = self._rows
        if len(rows) == 1 and rows[0].drafts is not None:
            self._decode_ahead(rows[0], *rows[0].drafts())
            return
        try:
            logits = list(self.graph.decode([job.token for job in rows], [job.length for job in rows]))
        except Exception:
            logits = []
        for slot in reversed(range(len(rows))):
            job = rows[slot]
            try:
                row = logits[slot] if logits else self.graph.decode_one(slot, job.token, job.length)
                job.length += 1
                move = job.strategy.advance(row[None])
            except Exception as error:
                self._leave(slot, error)
                continue
            if move is None:
                self._leave(slot)
            else:
                (job.token,) = move[0]

    def _decode_ahead(self, job: DecoderJob, draft: Sequence[int], right: float) -> None:
        """One step of a sequence alone: its token, and a draft of those behind it, as far as that pays.

        The last position of a job is never run (its token ends the answer), so there is always room for two.
        """
        width = self._costs.choose(len(draft), right, job.total - job.length)
        draft = draft[: width - 1]
        move: Move | None = None
        try:
            started = time.perf_counter()
            fill = [job.token] * (width - 1 - len(draft))
            logits = self.graph.run_ahead(0, [job.token, *draft, *fill], job.length)
            self._costs.add(width, time.perf_counter() - started)
            if job.clock is not None:
                job.clock.drafted_tokens += len(draft)
            for place in range(len(draft) + 1):
                job.length += 1
                move = job.strategy.advance(logits[place][None])
                if move is None:
                    break
                (job.token,) = move[0]
                if place == len(draft) or job.token != draft[place]:
                    break
                if job.clock is not None:
                    job.clock.accepted_tokens += 1
        except Exception as error:
            self._leave(0, error)
            return
        if move is None:
            self._leave(0)

    def _leave(self, slot: int, error: BaseException | None = None) -> None:
        """Take a sequence out; the last one takes its slot."""
        job, last = self._rows[slot], len(self._rows) - 1
        if slot != last:
            self.graph.move(last, slot, self._rows[last].length)
            self._rows[slot] = self._rows[last]
        self._rows.pop()
        if error is None:
            job.finish()
        else:
            job.fail(error)
