"""Requests on an encoder-decoder: encoded together as they come, then decoded together, one token a step.

A step encodes what was taken since the last one, and runs one token of every request. Their sequences, several for
beams and label words, join and leave between steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from edgeprompt.decoding.strategies import Logits, Move, Strategy
from edgeprompt.engines.scheduler import Job
from edgeprompt.engines.seq2seq.graphs import DecoderState, Seq2SeqGraphs, Source, SourceRow, joined
from edgeprompt.ort.free_memory import attention_bytes
from edgeprompt.ort.kv_cache import PrefixCache
from edgeprompt.ort.memory_budget import MemoryBudget
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.request import Clock

ATTENTION_BUDGET = 512 << 20
"""Most bytes of attention for texts that are encoded together; one text alone may take more."""


class Seq2SeqJob(Job):
    """A request on an encoder-decoder: its text is encoded, then either read, or answered by the decoder."""

    def __init__(self, source: SourceRow, timeout: float | None, answer: Callable[[], Any]) -> None:
        super().__init__(timeout, answer)
        self.source = source
        self.owner: LoadedPrompt | None = None
        """The prompt that the encoding depends on."""
        self.clock: Clock | None = None
        """Is told how many tokens were encoded before."""
        self.read: Callable[[Source, int], None] | None = None
        """Takes what the encoder made of the text, and the row; nothing is decoded then."""
        self.strategy: Strategy | None = None
        self.feed: Sequence[int] = ()
        """What the decoder is given before it decides: its start, and what the prompt lets it have said."""
        self.fed = 1
        self.prefix: Any = None
        """`[num_layers, 2, num_key_value_heads, prefix_length, head_size]` of the decoder's self-attention, or None."""
        self.text: DecoderState | None = None
        """Where the strategy begins again, if it does."""
        self.positions = source.ids.size
        """Most positions of self-attention and cross-attention that one of them takes."""
        self.rows = 1
        """Sequences that it has now."""

    @property
    def width(self) -> int:
        """Most sequences that it takes."""
        return 1 if self.strategy is None else self.strategy.width

    @property
    def begins_again(self) -> bool:
        """Whether it may go back to where its strategy began."""
        return self.strategy is not None and self.strategy.begins_again

    @property
    def prefix_length(self) -> int:
        """Positions of its prefix."""
        return 0 if self.prefix is None else int(self.prefix.shape[3])

    def advance(self, logits: Logits) -> Move | None:
        """The next tokens, and the sequences that they continue; None when done."""
        if self.fed < len(self.feed):
            self.fed += 1
            return [self.feed[self.fed - 1]], [0]
        assert self.strategy is not None
        return self.strategy.advance(logits)


class Seq2SeqLane:
    """Runs jobs in one batch of sequences (`edgeprompt.engines.scheduler.Lane`)."""

    def __init__(
        self, graphs: Seq2SeqGraphs, budget: MemoryBudget, kept: PrefixCache, *, max_rows: int, position_bytes: int
    ) -> None:
        """Share `budget` and `kept` with the other lanes; a position of one sequence takes `position_bytes`."""
        self._graphs, self._budget, self._kept, self._max_rows = graphs, budget, kept, max_rows
        self._position_bytes = position_bytes
        self._taken: list[Seq2SeqJob] = []
        """Jobs whose text is not encoded yet."""
        self._jobs: list[Seq2SeqJob] = []
        """Jobs that decode, in the order of their sequences in the state."""
        self._state: DecoderState | None = None
        self._tokens: list[int] = []

    @property
    def running(self) -> Sequence[Seq2SeqJob]:
        """Jobs that were taken and have not ended."""
        return [*self._jobs, *self._taken]

    def bytes(self, jobs: Sequence[Seq2SeqJob]) -> int:
        """What jobs take together: a step holds its input caches and its output caches."""
        longest = max((job.positions for job in jobs), default=0)
        return 2 * sum(job.width + job.begins_again for job in jobs) * longest * self._position_bytes

    def narrow(self, job: Seq2SeqJob) -> None:
        """Let a job take no more sequences than there is memory for, where its strategy can do with fewer."""
        strategy = job.strategy
        while strategy is not None and strategy.width > strategy.least_width:
            if self.bytes([job]) <= self._budget.total:
                break
            strategy.width = max(strategy.least_width, strategy.width // 2)

    def take(self, waiting: deque[Seq2SeqJob]) -> bool:
        """Take those at the front that fit beside what runs."""
        before = len(self._taken)
        while waiting and self._fits(waiting[0]):
            self._taken.append(waiting.popleft())
        return len(self._taken) > before

    def step(self) -> None:
        """Encode what is new, then run one token of every sequence."""
        if self._taken:
            for jobs in self._pieces(self._taken) if len(self._taken) > 1 else [[*self._taken]]:
                self._encode(jobs)
        if self._jobs:
            self._decode()

    def drop(self, job: Seq2SeqJob, error: BaseException) -> None:
        """End a job with an error."""
        if job in self._taken:
            self._taken.remove(job)
        else:
            rows, tokens, jobs = list[int](), list[int](), list[Seq2SeqJob]()
            for other, first in self._places():
                if other is not job:
                    jobs.append(other)
                    rows += range(first, first + other.rows)
                    tokens += self._tokens[first : first + other.rows]
            self._keep(jobs, rows, tokens)
        self._shrink()
        job.fail(error)

    def idle(self) -> None:
        """Nothing is kept."""

    def _fits(self, job: Seq2SeqJob) -> bool:
        running = self.running
        if running and sum(other.width for other in running) + job.width > self._max_rows:
            return False
        # A decoder without a mask cannot tell padding: then only those that go alike all along go together.
        if not self._graphs.masks_past and (
            self._jobs
            or any(other.prefix_length != job.prefix_length for other in self._taken)
            or (self._taken and (job.begins_again or self._taken[-1].begins_again))
        ):
            return False
        return self._budget.resize(self, self.bytes([*running, job]))

    def _shrink(self) -> None:
        self._budget.resize(self, self.bytes(self.running))

    def _places(self) -> list[tuple[Seq2SeqJob, int]]:
        """Every job that decodes, and where its sequences begin."""
        found, first = [], 0
        for job in self._jobs:
            found.append((job, first))
            first += job.rows
        return found

    def _keep(self, jobs: list[Seq2SeqJob], rows: Sequence[int], tokens: list[int]) -> None:
        """Go on with some sequences, which may repeat or lack those of the state."""
        assert self._state is not None
        if not jobs:
            self._state = None
        elif list(rows) != list(range(self._state.mask.shape[0])):
            self._state = self._state.take(rows)
        self._jobs, self._tokens = jobs, tokens

    def _encode(self, jobs: list[Seq2SeqJob]) -> None:
        """Encode texts that are new. If that fails, each is tried alone, so that only the culprit fails."""
        try:
            kept = {job: rows[0] for job in jobs if (rows := self._find(job))}
            new = [job for job in jobs if job not in kept]
            each = {self._key(job): job.source for job in new}  # the same text once
            places = {key: place for place, key in enumerate(each)}
            source = self._graphs.encode([*each.values()]) if each else None
            begun = [self._graphs.begin(Source.of_row(row), [job.prefix]) for job, row in kept.items()]
            decoding = [job for job in new if job.read is None]
            if source is not None and decoding:
                rows = [places[self._key(job)] for job in decoding]
                begun.append(self._graphs.begin(source.take(rows), [job.prefix for job in decoding]))
            for job in new:
                assert source is not None
                self._keep_encoding(job, source, places[self._key(job)])
                if job.read is not None:
                    job.read(source, places[self._key(job)])
            state = joined([*([] if self._state is None else [self._state]), *begun]) if begun else self._state
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._encode([job])
            else:
                self.drop(jobs[0], error)
            return
        self._state = state
        self._jobs += [*kept, *decoding]
        self._tokens += [job.feed[0] for job in (*kept, *decoding)]
        # Until here, whoever asks what runs sees them among the taken.
        self._taken = [job for job in self._taken if job not in jobs]
        for job in new:
            if job.read is not None:
                job.finish()
        self._shrink()

    def _pieces(self, jobs: Sequence[Seq2SeqJob]) -> list[list[Seq2SeqJob]]:
        """Jobs that are encoded together: attention grows with their number and the square of the longest text."""
        pieces = list[list[Seq2SeqJob]]()
        longest = 0
        for job in jobs:
            wider = max(longest, job.source.ids.size)
            if pieces and (len(pieces[-1]) + 1) * attention_bytes(wider, self._graphs.heads) <= ATTENTION_BUDGET:
                pieces[-1].append(job)
                longest = wider
            else:
                pieces.append([job])
                longest = job.source.ids.size
        return pieces

    @staticmethod
    def _key(job: Seq2SeqJob) -> Hashable:
        return job.source.name or job

    def _find(self, job: Seq2SeqJob) -> list[Any]:
        """What is kept of a text that was encoded before; whoever reads the encoder's states needs more."""
        found = [] if job.read is not None or not job.source.name else self._kept.find_blocks([job.source.name])
        if found and job.clock is not None:
            job.clock.reused_tokens = job.clock.input_tokens
        return found

    def _keep_encoding(self, job: Seq2SeqJob, source: Source, place: int) -> None:
        name = job.source.name
        if name and job.read is None and self._kept.budget and not self._kept.find_blocks([name]):
            self._kept.put_blocks([name], [source.row(place)], job.owner)

    def _decode(self) -> None:
        assert self._state is not None
        try:
            logits = self._graphs.step(self._state, self._tokens)
        except Exception:
            logits = self._each_alone(self._state)
            if not self._jobs:
                return
        left, again = list[tuple[Seq2SeqJob, Sequence[int]]](), list[tuple[Seq2SeqJob, Sequence[int]]]()
        rows, tokens = list[int](), list[int]()
        for job, first in self._places():
            try:
                move = job.advance(logits[first : first + job.rows])
            except Exception as error:
                job.fail(error)
                continue
            if move is None:
                job.finish()
                continue
            said, parents = move
            if parents is None:
                if job.text is None and not job.begins_again:
                    parents = [0] * len(said)  # the strategy's first move, and its last of this kind
                else:
                    job.text = job.text or self._state.take([first])
                    again.append((job, said))
                    continue
            left.append((job, said))
            tokens += said
            rows += [first + parent for parent in parents]
        gone = len(left) + len(again) < len(self._jobs)
        self._keep([job for job, _ in left], rows, tokens)
        self._begin_again(again)
        for job, said in [*left, *again]:
            job.rows = len(said)
        if gone:
            self._shrink()

    def _begin_again(self, jobs: Sequence[tuple[Seq2SeqJob, Sequence[int]]]) -> None:
        """Let jobs go on behind what they were before their strategies' first moves."""
        for job, tokens in jobs:
            assert job.text is not None
            begun = job.text.take([0] * len(tokens))
            self._state = begun if self._state is None else joined([self._state, begun])
            self._jobs.append(job)
            self._tokens += tokens

    def _each_alone(self, state: DecoderState) -> Logits:
        """Step every job alone; those that fail end."""
        states, found = list[DecoderState](), list[Logits]()
        jobs, tokens = list[Seq2SeqJob](), list[int]()
        for job, first in self._places():
            own, said = state.take(range(first, first + job.rows)), self._tokens[first : first + job.rows]
            try:
                found.append(self._graphs.step(own, said))
            except Exception as error:
                job.fail(error)
                continue
            states.append(own)
            jobs.append(job)
            tokens += said
        self._jobs, self._tokens, self._state = jobs, tokens, joined(states) if states else None
        self._shrink()
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)
