"""Everything around a training loop: files, terminal, signals, checkpoints."""

import contextlib
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from rlhf_jax.config.run import RunConfig, to_dict
from rlhf_jax.files.atomic import remove_temporary
from rlhf_jax.files.printable import one_line
from rlhf_jax.files.typed_fields import section
from rlhf_jax.run.checkpointer import Checkpointer, Keep
from rlhf_jax.run.fingerprints import fingerprints
from rlhf_jax.run.interrupt import Interrupted, Interruptible
from rlhf_jax.run.log_files import MetricsWriter, SamplesWriter, read_metrics
from rlhf_jax.run.nonfinite import FiniteCheck
from rlhf_jax.run.progress import progress, warn
from rlhf_jax.run.report import write_report
from rlhf_jax.run.resume import (
    check_fingerprints,
    check_history,
    check_resume,
    choose_checkpoint,
)
from rlhf_jax.run.run_directory import RunDirectory, check_run, open_run
from rlhf_jax.run.run_lock import check_free, run_lock

State = TypeVar("State")


def _stored(config: RunConfig) -> dict[str, Any]:
    """The configuration without options that describe only this start of the run."""
    values = to_dict(config)
    of_this_start = ("resume", "resume_step", "accept_changed", "quiet")
    return {name: values[name] for name in values if name not in of_this_start}


def check_start(config: RunConfig) -> None:
    """Raises ValueError, before any work, if the run cannot start."""
    config.validate()
    run = RunDirectory(Path(config.run_dir))
    check_free(run)
    check_run(run.path, _stored(config), **_start(config))
    if config.resume:
        check_resume(config, run)


def _start(config: RunConfig) -> dict[str, Any]:
    """How the run starts, for `check_run` and `open_run`."""
    return {
        "stage": config.stage,
        "resume": config.resume,
        "free_on_resume": config.free_on_resume(),
    }


class Session(contextlib.ExitStack):
    """One run directory from first step to report, as a context manager.

    Step 0 is the state before training; step n is the state after n steps. Used as

        with Session(config) as session:
            state = session.restore(state)
            for step in session.steps():
                …
                session.log(step, metrics, shown={"loss": "train/loss"})
                session.checkpoint(step, state)

    The run directory is locked until the session ends.

    Args:
        config: validated configuration.

    Attributes:
        run: the run directory.
        start_step: the step to continue after; 0: a new run.
        counters: numbers by name that every checkpoint includes; continued on resume.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.stage = config.stage
        self.total_steps = config.total_steps
        self.counters: dict[str, float] = {}
        stored, start = _stored(config), _start(config)
        run = RunDirectory(Path(config.run_dir))
        check_run(run.path, stored, **start)
        run.path.mkdir(parents=True, exist_ok=True)
        self.enter_context(run_lock(run))
        self.run: RunDirectory = open_run(run.path, stored, **start)
        remove_temporary(run.path)  # of a process that was killed

    def __enter__(self) -> "Session":
        super().__enter__()
        self._overflowed: set[str] = set()  # metrics already warned about
        config, run = self.config, self.run
        keep = Keep(latest=config.checkpoint_keep, every=config.checkpoint_keep_every)
        # Before the checkpointer, so that a signal does not break its last write.
        self._interrupt = self.enter_context(Interruptible())
        self._checkpointer = self.enter_context(
            Checkpointer(run.checkpoints, keep=keep)
        )
        self._fingerprints = fingerprints(config)
        self.start_step = self._first_step()
        # Metrics by which checkpoints are kept, and what makes their best the highest.
        best = {"highest": (config.checkpoint_keep_highest, 1.0)}
        best["lowest"] = (config.checkpoint_keep_lowest, -1.0)
        self._best = {
            f"{kind} {name}": (name, sign)
            for kind, (name, sign) in best.items()
            if name
        }
        self._values: dict[str, float] = {}  # of the step that was logged last
        self._progress = self.enter_context(
            progress(
                self.total_steps,
                self.stage,
                start=self.start_step,
                quiet=config.quiet,
            )
        )
        return self

    def _first_step(self) -> int:
        """The step to resume after; 0: a new run."""
        config, checkpointer = self.config, self._checkpointer
        if not config.resume:
            return 0
        step = config.resume_step
        if step is None:
            step = choose_checkpoint(checkpointer, self.run)
        if step > 0:
            now = self._fingerprints
            for change in check_fingerprints(config, self.run, checkpointer, step, now):
                warn(change)
            check_history(config, self.run, checkpointer.steps(), step)
        return step

    def restore(self, state: State) -> State:
        """`state`, or the checkpoint's when resuming, consuming it; opens the logs.

        Once the checkpoint is read, later checkpoints and then later log lines are
        removed: if killed in between, the next start finds everything it needs. Later
        checkpoints that are damaged are renamed instead.
        """
        if self.start_step == 0:
            self._open_logs()
            return state
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # two states of a large model may not fit in memory
        state, data = self._checkpointer.restore(self.start_step, like)
        self.counters |= section(data, "counters")
        self._clear_after(self.start_step)
        self._open_logs()
        # Checkpoints lack the values of metrics that were not asked for then, and of
        # evaluations after them.
        for row in read_metrics(self.run.metrics) if self._best else ():
            self._rate(int(row["step"]), row)
        return state

    def _clear_after(self, step: int) -> None:
        checkpointer = self._checkpointer
        if self.config.resume_step is None:
            # All later ones are damaged, or they would have been chosen.
            for later in checkpointer.steps():
                if later > step:
                    checkpointer.set_aside(later)
        checkpointer.remove_after(step)

    def _open_logs(self) -> None:
        config, run = self.config, self.run
        # A resumed run has already logged its first steps; a new one logs from 0.
        first = self.start_step + 1 if self.start_step else 0
        self._metrics = self.enter_context(
            MetricsWriter(
                run.metrics,
                start_step=first,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=to_dict(config),
            )
        )
        self._samples = self.enter_context(SamplesWriter(run.samples, start_step=first))
        self.check_finite = FiniteCheck(
            config,
            run,
            rescue=self._rescue,
            saved=self._checkpointer.steps,
            counters=self.counters,
        )

    def history(self, metric: str) -> list[float]:
        """Logged values of a metric from before this start."""
        if self.start_step == 0:
            return []
        return [row[metric] for row in read_metrics(self.run.metrics) if metric in row]

    def evaluation_is_missing(self) -> bool:
        """Whether an evaluation was due after the last step before this start, but was
        not logged."""
        rows = read_metrics(self.run.metrics)
        last = [row for row in rows if row["step"] == self.start_step]
        is_there = any(name.startswith("eval/") for row in last for name in row)
        return self.is_eval_step(self.start_step) and not is_there

    def steps(self) -> range:
        """The remaining steps."""
        return range(self.start_step + 1, self.total_steps + 1)

    def is_eval_step(self, step: int) -> bool:
        """Whether an evaluation is due after this step."""
        return step % self.config.eval_every == 0 or step == self.total_steps

    def log(
        self, step: int, metrics: Mapping[str, float], *, shown: Mapping[str, str]
    ) -> None:
        """Logs the metrics of a step; shows those in `shown`, by label.

        Non-finite metrics are logged as they are, with a warning the first time.
        `optim/skipped` is the number of steps skipped so far, with on-nonfinite=skip.
        """
        if self.config.on_nonfinite == "skip":
            metrics = {**metrics, "optim/skipped": self.check_finite.skipped}
        self._metrics.write(step, metrics)
        self._rate(step, metrics)
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in self._overflowed:
                self._overflowed.add(name)
                why = "training continues, since loss and gradients are finite"
                if name.startswith("eval/"):
                    why = "the weights may be corrupted; training continues"
                warn(f"step {step}: {name} is {float(value)}; {why} (shown once)")
        found = {label: name for label, name in shown.items() if name in metrics}
        self._progress.update(
            step, {label: metrics[name] for label, name in found.items()}
        )

    def _rate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remembers the values by which the best checkpoints are kept."""
        self._values = {
            key: sign * float(metrics[name])
            for key, (name, sign) in self._best.items()
            if name in metrics and math.isfinite(metrics[name])
        }
        if self._values:
            self._checkpointer.rate(step, self._values)

    def _is_best(self) -> bool:
        """Whether the step that was logged last is the best so far in a metric."""
        return any(
            value > max(self._checkpointer.values(name), default=-math.inf)
            for name, value in self._values.items()
        )

    def _rescue(self, step: int, state: Any) -> None:
        """Saves the state after `step`, if it is not saved; removes no checkpoint.

        Step 0 is not saved: the configuration determines it.
        """
        if step > (self._checkpointer.latest_step() or 0):
            self._save(step, state, rescue=True)
            self._checkpointer.wait()

    def _save(self, step: int, state: Any, *, rescue: bool = False) -> None:
        # Before the checkpoint: after a power cut it must not lack its own history.
        self._metrics.sync()
        self._samples.sync()
        data = {
            "step": step,
            "counters": self.counters,
            "fingerprints": self._fingerprints,
        }
        self._checkpointer.save(step, state, data, values=self._values, rescue=rescue)

    def save_and_raise(self, step: int, state: Any, error: ValueError) -> NoReturn:
        """Saves the state after `step` and raises the error, with how to resume."""
        if step == 0:
            raise error
        try:
            self._rescue(step, state)
        except (OSError, ValueError) as second:
            raise type(error)(
                f"{error}. The state after step {step} could not be saved "
                f"({one_line(second)}); fix both, then resume from the last "
                f"checkpoint with: {self._resume_command()}"
            ) from None
        raise type(error)(
            f"{error}. The run is saved after step {step}; fix this, then resume "
            f"with: {self._resume_command()}"
        ) from None

    def _resume_command(self) -> str:
        config = shlex.quote(str(self.run.config))
        return f"rlhf-jax {self.stage} --config {config} --resume"

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Logs prompts with responses."""
        self._samples.write(step, samples)

    def checkpoint(self, step: int, state: Any, *, last: bool = False) -> None:
        """Saves a checkpoint if due, and stops the run if requested.

        Args:
            step: number of the step.
            state: state after it.
            last: the run ends here, before its last step.

        Raises:
            Interrupted: after saving, with the command to resume.
        """
        stop = self._interrupt.requested_anywhere()
        due = step % self.config.checkpoint_every == 0 or step == self.total_steps
        due |= last
        if due or stop or self._is_best():
            self._save(step, state)
        if stop:
            self._checkpointer.wait()
            raise Interrupted(
                f"{self.stage} stopped after step {step} of {self.total_steps}; its "
                f"checkpoint is in {self.run.checkpoints}. Resume with: "
                f"{self._resume_command()}"
            )

    def report(self, **options: Any) -> None:
        """Writes the report of the run, which has ended."""
        if jax.process_index() == 0:
            with run_lock(self.run):
                self._checkpointer.prune()  # a kill may have come just before
                write_report(self.run.path, **options)
