"""Training: from a configuration to a run directory, whoever launched the processes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replknet.engine.allocator import keep_freed_memory
from replknet.engine.batches import grouped
from replknet.engine.checkpoint import read_state, refuse_other_data, save_state
from replknet.engine.config import TrainConfig, require, split_batch
from replknet.engine.distributed import Processes, join_processes
from replknet.engine.environment import describe_environment
from replknet.engine.evaluate import EvaluationStopped, evaluate
from replknet.engine.interrupt import StopRequest
from replknet.engine.logs import MetricLog, ProgressLine
from replknet.engine.run_directory import RunDirectory, claim
from replknet.engine.setup import create_state, wrap
from replknet.engine.step import WAY_OUT, NonFiniteError, Step, Stepper, seed_everything
from replknet.models import save_checkpoint
from replknet.models.writing import write_whole
from replknet.tasks.task import LoaderOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run stands when ``main`` returns.

    Attributes:
        main: whether this is the process that reports.
        finished: False if it was asked to stop; the same call continues it.
        stopped_by: signal that this process was asked with, if any.
        best: epoch and value of the primary metric of the best evaluation.
        evaluation: metrics of the last evaluation.
    """

    directory: Path
    main: bool
    step: int
    finished: bool
    stopped_by: int | None
    best: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def main(config: TrainConfig) -> TrainResult:
    """Train as ``config`` says, or continue the run that its directory holds.

    Call it in every process (torchrun, submitit, Ray, or a single one); the directory must be
    visible to all of them.

    Raises:
        ValueError: the configuration cannot work, or the directory holds something else.
        NonFiniteError: NaN or infinity in the loss, the gradients or the metrics.
        OSError: a file cannot be written; earlier checkpoints are intact.
    """
    with (
        join_processes(config.execution.device) as processes,
        StopRequest() as stop,
        open_run(config, processes) as directory,
        Training(config, directory, processes, stop) as training,
    ):
        return training.run()


@contextmanager
def open_run(config: TrainConfig, processes: Processes) -> Iterator[RunDirectory]:
    """Claim the run directory in the main process; a refusal is raised in all of them."""
    with ExitStack() as claims:
        refusal = None
        if processes.main:
            try:
                directory = claims.enter_context(claim(config))
            except ValueError as error:
                refusal = str(error)
            else:
                text = json.dumps(describe_environment(processes), indent=2)
                write_whole(directory.environment, lambda partial: partial.write_text(text))
        refusal = processes.broadcast(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield RunDirectory(Path(config.run.directory))


class Training:
    """A run: its parts, and the loop over them. The main process writes, all compute."""

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        processes: Processes,
        stop: StopRequest,
    ) -> None:
        self.config, self.directory = config, directory
        self.processes, self.stop = processes, stop
        if processes.device.type == "cpu":
            keep_freed_memory()
        batch_size, self.accumulation = split_batch(config.batch, processes.world_size)
        options = LoaderOptions(
            batch_size=batch_size,
            seed=config.run.seed,
            workers=config.run.workers,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        seed_everything(config.run.seed, 0, 0)
        self.task = config.build_task()
        self.train_loader = self.task.train_loader(options)
        self.eval_loader = self.task.eval_loader(options) if config.run.eval_every else ()
        self.steps_per_epoch = len(self.train_loader) // self.accumulation
        require(
            self.steps_per_epoch > 0,
            f"batch.total {config.batch.total} exceeds the training set; use a smaller one",
        )
        self.trained_on = {
            "samples_per_epoch": self.steps_per_epoch * config.batch.total,
            **json.loads(json.dumps(self.task.metadata())),  # lists, as they are read back
        }
        self.state = create_state(config, self.task, processes)
        saved = read_state(directory.checkpoints)
        if saved is not None:
            refuse_other_data(directory.root, saved, self.trained_on)
            self.state.load_state_dict(saved)
        network = wrap(self.state.model, config.execution, processes)
        self.stepper = Stepper(
            config, self.task, self.state, network, processes, directory.nonfinite
        )
        self.saved_at = time.monotonic()
        self.log = None
        if processes.main:
            size = 0 if saved is None else saved["metrics_size"]
            self.log = MetricLog(directory, step=self.state.step, size=size)
        self.line = ProgressLine(
            config.schedule.epochs * self.steps_per_epoch,
            done=self.state.step,
            visible=processes.main and config.run.progress,
        )

    def __enter__(self) -> Training:
        self.line.__enter__()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.line.__exit__()
        # a full disk that ended the run also fails the last flush: keep the first error
        with suppress(OSError) if error_type is not None else nullcontext():
            if self.log is not None:
                self.log.close()

    def run(self) -> TrainResult:
        """Train and evaluate to the end of the schedule, or until a stop is asked for."""
        state, finished = self.state, False
        self.introduce()
        while not finished:
            epoch, position = divmod(state.step, self.steps_per_epoch)
            if position == 0 and state.finished_epochs < epoch and not self.finish_epoch(epoch):
                break
            finished = epoch >= self.config.schedule.epochs
            if not finished and not self.train_epoch(epoch, position):
                break
        if not finished:
            self.save()
        return TrainResult(
            directory=self.directory.root,
            main=self.processes.main,
            step=state.step,
            finished=finished,
            stopped_by=self.stop.signal,
            best=state.best,
            evaluation=state.evaluation,
        )

    def introduce(self) -> None:
        """Say what is trained on what, and where the run stands."""
        processes, step = self.processes, self.state.step
        together = f" in {processes.world_size} processes" if processes.world_size > 1 else ""
        self.line.print(f"{self.task.describe()}, {processes.device}{together}")
        if step:
            self.line.print(f"continuing {self.directory.root} after step {step}")
        elif processes.main and (concern := self.config.concern()) is not None:
            logger.warning(concern)

    def train_epoch(self, epoch: int, position: int) -> bool:
        """Train the rest of ``epoch`` (from 0) from its step ``position``; False if stopped."""
        batches = self.train_loader.epoch(epoch, skip=position * self.accumulation)
        logged_at, logged_step = time.monotonic(), self.state.step
        for group in grouped(batches, self.accumulation):
            step = self.stepper.take(group, self.steps_per_epoch, stop=self.stop.requested)
            if self.state.step % self.config.run.log_every == 0:
                now = time.monotonic()
                samples = (self.state.step - logged_step) * self.config.batch.total
                self.record(epoch + 1, step, samples / max(now - logged_at, 1e-9))
                logged_at, logged_step = now, self.state.step
            if step.stop:
                return False
            if self.save_due():
                self.save()
        return True

    def finish_epoch(self, epoch: int) -> bool:
        """Evaluate after ``epoch`` epochs if it is time to, and save; False if stopped."""
        state, run = self.state, self.config.run
        last = epoch >= self.config.schedule.epochs
        metrics: dict[str, Any] = {}
        if run.eval_every and (epoch % run.eval_every == 0 or last):
            try:
                metrics = evaluate(
                    state.evaluated_model,
                    self.task,
                    self.eval_loader,
                    self.config.execution,
                    self.processes,
                    stop=self.stop.requested,
                )
            except EvaluationStopped:
                return False
            except Exception:
                self.save()  # the next launch begins with this evaluation
                raise
            refuse_nonfinite(epoch, metrics)
            state.evaluation = metrics
            self.keep_best(epoch, metrics)
            if self.log is not None:
                self.log.write({"step": state.step, "epoch": epoch, "evaluation": metrics})
        state.finished_epochs = epoch
        self.save(metrics)
        return True

    def keep_best(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Save the evaluated model if no earlier one was better."""
        name, best = self.task.primary_metric, self.state.best
        if best is None or metrics[name] > best["value"]:
            best = self.state.best = {"epoch": epoch, "metric": name, "value": metrics[name]}
            self.save_model("best", metrics)
        self.line.print(
            f"epoch {epoch}: {name} {metrics[name]:.4f}  "
            f"(best {best['value']:.4f}, epoch {best['epoch']})"
        )

    def record(self, epoch: int, step: Step, samples_per_second: float) -> None:
        """Write down the figures of a training step."""
        record = {
            "step": self.state.step,
            "epoch": epoch,
            "loss": step.loss,
            "lr": step.lr,
            "grad_norm": step.grad_norm if math.isfinite(step.grad_norm) else None,
            "samples_per_second": round(samples_per_second, 2),
        }
        if self.log is not None:
            self.log.write(record)
        self.line.update(record)

    def save_due(self) -> bool:
        """Whether enough work has been done since the last checkpoint."""
        run = self.config.run
        minutes = (time.monotonic() - self.saved_at) / 60
        return (run.checkpoint_minutes is not None and minutes >= run.checkpoint_minutes) or (
            run.checkpoint_steps is not None and self.state.step % run.checkpoint_steps == 0
        )

    def save(self, metrics: dict[str, Any] | None = None) -> None:
        """Write the last model, with its metrics if it has some, and the state to continue from."""
        self.saved_at = time.monotonic()
        if self.log is None:
            return
        self.save_model("last", metrics or {})
        beside = {"trained_on": self.trained_on, "metrics_size": self.log.sync()}
        save_state(self.directory.checkpoints, self.state.state_dict() | beside)

    def save_model(self, name: str, metrics: dict[str, Any]) -> None:
        """Write the evaluated weights as a model file, usable without the run."""
        if not self.processes.main:
            return
        figures = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        metadata = self.task.metadata() | {"metrics": figures, "step": self.state.step}
        path = self.directory.checkpoints / f"{name}.safetensors"
        save_checkpoint(path, self.state.evaluated_model, metadata)


def refuse_nonfinite(epoch: int, metrics: dict[str, Any]) -> None:
    """Raise NonFiniteError if a number at the top level of ``metrics`` is NaN or infinite."""
    broken = [
        f"{name} {value}"
        for name, value in metrics.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if broken:
        raise NonFiniteError(
            f"the evaluation after epoch {epoch} gives {', '.join(broken)}; no checkpoint was "
            f"overwritten. {WAY_OUT}"
        )
