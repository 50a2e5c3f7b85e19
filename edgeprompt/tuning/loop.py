"""The training loop: accelerate underneath, best prompt kept, checkpoints that go on bit for bit."""

from __future__ import annotations

import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprompt.errors import TuningError
from edgeprompt.package import strict_json
from edgeprompt.package.files import atomic_file, check_regular
from edgeprompt.package.fingerprint import brief
from edgeprompt.package.manifest import Base
from edgeprompt.package.outputs import CHECKPOINT
from edgeprompt.tuning.examples import BatchPlan, Examples
from edgeprompt.tuning.objectives import Objective
from edgeprompt.tuning.options import HEAD_RATE, TuneOptions
from edgeprompt.tuning.packages import PackageWeights
from edgeprompt.tuning.record import Recorder

_WARMUP = 0.05
_CLIP = 1.0
_TAIL = 0.25
"""Share of the steps at the end over which the prompt is averaged."""


@dataclass
class Progress:
    """How far a run is, and the best it has found."""

    step: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Figures of the best evaluation; empty without evaluation."""
    best_parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    waited: int = 0
    """Evaluations since the best."""
    evaluated: int = 0
    """Step of the last evaluation."""
    seconds: float = 0.0
    """Time spent in training steps."""
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """Mean of the parameters over the last steps of the run."""
    averaged: int = 0
    """Steps that `average` is over."""
    keeps_average: bool = False
    """Whether the prompt that was kept is `average`."""


class _Step(nn.Module):
    """One step's loss, and over how much it is summed, as a module's forward, which accelerate wraps."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self.__dict__["objective"] = objective

    def forward(self, examples: Examples, indices: Sequence[int]) -> tuple[torch.Tensor, int]:
        objective: Objective = self.__dict__["objective"]
        outcome = objective.measure([examples[index] for index in indices])
        return outcome.loss, outcome.count


class Loop:
    """Trains an objective's model on a batch plan."""

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        plan: BatchPlan,
        eval_batches: tuple[Examples, Sequence[Sequence[int]]],
        options: TuneOptions,
        *,
        steps: int,
        checkpoint: Path,
        signature: Mapping[str, Any],
        weights: PackageWeights,
    ) -> None:
        """`eval_batches`: examples and which of them to evaluate on, none for no evaluation; `signature`: what a
        checkpoint must agree with to go on; `weights`: those that take turns in the base."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

        # accelerate keeps the first run's precision for the whole process, and refuses another
        AcceleratorState._reset_state()
        # A step of several tasks does not touch every task's factors.
        several = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[several])
        self._objective, self._examples, self._plan, self._options = objective, examples, plan, options
        self._eval_examples, self._eval_batches = eval_batches
        self._weights = weights
        self._steps, self._checkpoint, self._signature = steps, checkpoint, strict_json.dumps(signature)
        if options.mixed_precision != "no":
            objective.model.base.to({"bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision])
        objective.model.to(self.accelerator.device)
        self.parameters = {name: value for name, value in objective.model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(_groups(objective.model, options), weight_decay=0.0)
        self._module, self._optimizer = self.accelerator.prepare(_Step(objective), optimizer)
        self.progress = Progress()
        self._evaluated = 1.0
        """Answers that the last evaluation compared."""
        self._tell: Callable[[int, int], None] = lambda done, total: None
        """Called with how many batches of an evaluation are done, and how many there are."""
        self._random = torch.get_rng_state()
        """Random state before the step that is under way."""
        self._changed = False
        """Whether a step of this process changed the prompt."""

    def run(self, *, show: bool) -> Progress:
        """Train until the last step, or until evaluation stops getting better.

        Raises:
            TuningError: the loss is not finite, or Ctrl-C or a signal stopped the run (a checkpoint is written first).
        """
        every = self._options.eval_steps or max(1, math.ceil(self._steps / 5))
        progress, began = self.progress, self.progress.step
        main = self.accelerator.is_main_process
        log = self._options.log if main else None
        with Recorder(log, total=self._steps, start=progress.step, progress=show and main) as recorder:
            self._tell = recorder.evaluating
            try:
                while True:
                    self._random = torch.get_rng_state()
                    due = progress.step and (progress.step % every == 0 or progress.step == self._steps)
                    if due and progress.evaluated != progress.step:
                        self._evaluate_and_keep(recorder)
                        self.save(self._checkpoint)
                    if progress.step >= self._steps or self._patience_spent():
                        break
                    recorder.step(progress.step + 1, self._train_step())
            except (KeyboardInterrupt, SystemExit) as error:
                self.save(self._checkpoint)
                raise self._stopped(error) from error
            if progress.step > began and not self._changed:
                raise TuningError(
                    "no step changed the prompt: every gradient exceeded float16; use --mixed-precision bf16 or no"
                )
            with self.kept():
                self._choose()
        return progress

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Name the checkpoint where a signal stops what follows the last step; it lies there until the prompt does."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:
            raise self._stopped(error) from error

    def _stopped(self, error: BaseException) -> TuningError:
        where = f"after step {self.progress.step}; go on with --resume {self._checkpoint} and the same other options"
        return stopped(error, where)

    def _choose(self) -> None:
        """Keep the average of the last steps, unless an evaluated prompt is better by more than the standard error.

        The best of several evaluations on few examples is the best by chance; the average needs no choosing.
        """
        progress = self.progress
        if progress.averaged:
            self._set_parameters(progress.average)
            figures = self.evaluate()
            if not figures or not progress.best or not self._clearly_better(progress.best, figures):
                progress.best, progress.best_step, progress.keeps_average = figures, progress.step, True
                return
        if progress.best_parameters:
            self._set_parameters(progress.best_parameters)
        else:
            progress.best_step = progress.step

    def _clearly_better(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        """Whether an evaluation's figures are better than another's by more than chance."""
        if self._objective.by_loss:
            return one["loss"] < other["loss"]
        share = min(max(other[self._objective.metric], 0.0), 1.0)
        error = math.sqrt(share * (1 - share) / self._evaluated)
        return one[self._objective.metric] - other[self._objective.metric] > error

    def _average(self) -> None:
        """Take the parameters of this step into the mean, where the run is near its end."""
        progress = self.progress
        if progress.step <= self._steps * (1 - _TAIL):
            return
        progress.averaged += 1
        for name, value in self.parameters.items():
            mean = progress.average.setdefault(name, torch.zeros_like(value, device="cpu", requires_grad=False))
            mean += (value.detach().cpu() - mean) / progress.averaged

    def _why_not_finite(self, rate: float, *, gradient: bool = False) -> str:
        """What is wrong where a loss is not finite, and what to do about it."""
        if self._options.mixed_precision == "fp16":
            return "float16 ends at 65504, which this base exceeds; use --mixed-precision bf16 or no"
        if not self.progress.step and not gradient:
            return "nothing was trained yet: the base's own weights give it, or the prompt that the run started as"
        return f"try a lower --lr than {rate:g}"

    def _patience_spent(self) -> bool:
        return self._options.patience is not None and self.progress.waited >= self._options.patience

    def _train_step(self) -> dict[str, float]:
        started = time.perf_counter()
        step, world = self.progress.step, self.accelerator.num_processes
        factor = _schedule(step, self._steps)
        rate = self._options.rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * factor
        self._weights.use(self._weights.at(step))
        self._optimizer.zero_grad()  # an interrupted step may have left some
        self._objective.model.train()
        indices = self._plan.batch(step)
        mine = indices[self.accelerator.process_index :: world]
        with self.accelerator.autocast():
            total, count = self._module(self._examples, mine or indices[:1])
        if not mine:  # fewer examples than processes: this one has none, and takes part all the same
            total, count = total * 0, 0
        # Gradients are averaged over processes: this makes them those of the whole batch's mean.
        loss = total * world / self._sum(count)
        shown = self._sum(loss.item()) / world
        if not math.isfinite(shown):
            raise TuningError(f"the loss is {shown} at step {step + 1}; {self._why_not_finite(rate)}")
        self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), _CLIP))
        scaled = self.accelerator.scaler is not None  # which leaves out a step whose gradient overflows float16
        if not math.isfinite(norm) and not scaled:
            raise TuningError(f"the gradient is {norm} at step {step + 1}; {self._why_not_finite(rate, gradient=True)}")
        seconds = time.perf_counter() - started
        with uninterrupted():  # half an update would be neither this step nor the next
            self._optimizer.step()
            self._changed |= not (scaled and self.accelerator.optimizer_step_was_skipped)
            self.progress.step += 1
            self.progress.seconds += seconds
            self._average()
        return {
            "loss": shown,
            "learning_rate": rate,
            "gradient_norm": norm,
            "examples_per_second": len(indices) / seconds,
        }

    def _sum(self, value: float) -> float:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        whole: torch.Tensor = self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "sum")
        return float(whole)

    def _evaluate_and_keep(self, recorder: Recorder) -> None:
        figures = self.evaluate()
        progress, metric = self.progress, self._objective.metric
        with uninterrupted():
            progress.evaluated = progress.step
            if not figures:
                return
            if not progress.best or self._rank(figures) > self._rank(progress.best):
                progress.best, progress.best_step, progress.waited = figures, progress.step, 0
                progress.best_parameters = {name: value.detach().clone() for name, value in self.parameters.items()}
            else:
                progress.waited += 1
        note = f"{metric} {figures[metric]:.3f} (best {progress.best[metric]:.3f})"
        recorder.evaluation(progress.step, figures, note)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and metric over the eval batches, on all packages' weights; empty without any."""
        if not self._eval_batches:
            return {}
        model, accelerator = self._objective.model, self.accelerator
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        mine = self._eval_batches[accelerator.process_index :: accelerator.num_processes]
        turns, done = max(1, len(self._weights)), 0
        self._tell(0, turns * len(mine))
        for turn in range(turns):
            self._weights.use(turn)
            with accelerator.autocast():
                shared = self._objective.model.shared()
                for batch in mine:
                    outcome = self._objective.measure([self._eval_examples[index] for index in batch], shared)
                    sums += torch.tensor([float(outcome.loss), outcome.correct, outcome.count], dtype=torch.float64)
                    done += 1
                    self._tell(done, turns * len(mine))
        loss, correct, count = accelerator.reduce(sums.float().to(accelerator.device), "sum").tolist()
        if not math.isfinite(loss):
            why = self._why_not_finite(self._options.rate)
            raise TuningError(f"the eval loss is {loss} after step {self.progress.step}; {why}")
        self._evaluated = count / max(1, len(self._weights))
        return {"loss": loss / count, self._objective.metric: correct / count}

    def _rank(self, figures: Mapping[str, float]) -> tuple[float, float]:
        """What makes an evaluation better: the metric, then the loss; or the loss alone."""
        metric = 0.0 if self._objective.by_loss else figures[self._objective.metric]
        return metric, -figures["loss"]

    def _set_parameters(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def save(self, path: Path) -> None:
        """Write a checkpoint: parameters, the best ones, optimizer, step and random state.

        Raises:
            TuningError: it cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        progress = self.progress
        content = {
            "signature": self._signature,
            "parameters": {name: value.detach().cpu() for name, value in self.parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "random": self._random,
            "progress": {name: getattr(progress, name) for name in progress.__dataclass_fields__},
        }
        # Through memory: on a full disk torch raises what no caller can tell from a bug.
        data = io.BytesIO()
        torch.save(content, data)
        try:
            with atomic_file(path, CHECKPOINT) as temporary:
                temporary.write_bytes(data.getbuffer())
        except OSError as error:
            raise TuningError(f"cannot write the checkpoint {str(path)!r}: {error.strerror or error}") from error

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            TuningError: no checkpoint, or one of another run; the message names the first setting that differs.
        """
        try:
            check_regular(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            theirs, ours = strict_json.loads(content["signature"]), strict_json.loads(self._signature)
            progress = Progress(**content["progress"])
        except Exception as error:  # torch and pickle raise many kinds for a broken file
            raise TuningError(f"cannot go on from {str(path)!r}: no checkpoint of edgeprompt tune") from error
        for name in ours:
            if not _same(name, theirs.get(name), ours[name]):
                raise TuningError(
                    f"checkpoint {str(path)!r} was made with {name} {_shown(name, theirs.get(name))}, this run has "
                    f"{_shown(name, ours[name])}"
                )
        self._set_parameters(content["parameters"])
        self._optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        self.progress = progress

    def forget_checkpoint(self) -> None:
        """Remove the checkpoint of a run that is done."""
        if self.accelerator.is_main_process:
            with suppress(FileNotFoundError):
                self._checkpoint.unlink()


def _same(name: str, theirs: Any, ours: Any) -> bool:
    """Whether two runs agree in a setting; fingerprints of a base may be of different formats."""
    if name == "base" and isinstance(theirs, str):
        return Base("", theirs).matches(Base("", ours))
    return bool(theirs == ours)


def _shown(name: str, value: Any) -> str:
    return brief(value) if name == "base" and isinstance(value, str) else repr(value)


def stopped(error: BaseException, where: str) -> TuningError:
    """What to raise for Ctrl-C, or for the SystemExit that a signal's handler raised, whose exit code it keeps."""
    how = "interrupted"
    code = getattr(error, "code", None)
    if isinstance(code, int) and code > 128:
        how = f"stopped by {signal.Signals(code - 128).name}"
    made = TuningError(f"{how} {where}")
    made.exit_code = 1 if code is None else code  # type: ignore[attr-defined]
    return made


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait until the block is done; their handlers, where Python has some, run then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {
        number: signal.signal(number, lambda number, frame: waiting.append((number, frame)))
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) is not None and callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            handlers[number](number, frame)


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a short linear warm-up, then down to a tenth along a line."""
    warmup = max(1, round(steps * _WARMUP))
    return min((step + 1) / warmup, 1 - 0.9 * step / steps)


def _groups(model: nn.Module, options: TuneOptions) -> list[dict[str, Any]]:
    """The trainable parameters: the prompt's, and a head's, which starts from nothing and has a rate of its own."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    prompt = [value for name, value in named if "encoder." in name and "soft." in name]
    head = [value for _, value in named if not any(value is known for known in prompt)]
    groups = [(prompt, options.rate), (head, options.rate if options.method == "head" else HEAD_RATE)]
    return [{"params": values, "lr": rate, "full_rate": rate} for values, rate in groups if values]
