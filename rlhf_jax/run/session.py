"""Everything around a training loop: files, terminal, signals, checkpoints."""

import contextlib
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from rlhf_jax.algo.options import check
from rlhf_jax.config.run import RunConfig, to_dict
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.run.checkpointer import Checkpointer
from rlhf_jax.run.interrupt import Interruptible
from rlhf_jax.run.log_files import MetricsWriter, SamplesWriter, read_metrics
from rlhf_jax.run.nonfinite import FiniteCheck
from rlhf_jax.run.progress import progress, warn
from rlhf_jax.run.report import write_report
from rlhf_jax.run.run_directory import (
    RunDirectory,
    check_run,
    fingerprint,
    open_run,
)

State = TypeVar("State")


def _stored(config: RunConfig) -> dict[str, Any]:
    """The configuration without options that describe only this start of the run."""
    values = to_dict(config)
    of_this_start = ("resume", "resume_step", "quiet")
    return {name: values[name] for name in values if name not in of_this_start}


def _weights(config: RunConfig) -> dict[str, str]:
    """Fingerprints, by option, of models that checkpoints do not include."""
    return {
        name: fingerprint(local_directory(path))
        for name, path in config.unsaved_models().items()
        if path is not None
    }


def check_start(config: RunConfig) -> None:
    """Raises ValueError, before any work, if the run cannot start."""
    config.validate()
    check_run(
        config.run_dir,
        _stored(config),
        stage=config.stage,
        resume=config.resume,
        free_on_resume=config.free_on_resume(),
        weights=_weights(config),
    )
    if config.resume_step is not None:
        _check_saved(config.resume_step, RunDirectory(Path(config.run_dir)))


def _check_saved(step: int, run: RunDirectory) -> None:
    """Raises ValueError if there is no checkpoint of that step."""
    saved = []
    if run.checkpoints.exists():
        with Checkpointer(run.checkpoints) as checkpointer:
            saved = checkpointer.steps()
    check(
        step in saved,
        "resume-step",
        step,
        f"has no checkpoint in {run.checkpoints}; there are: "
        f"{', '.join(map(str, saved)) or 'none'}",
    )


class Interrupted(SystemExit):
    """The run was stopped on request and can be resumed."""


class Session(contextlib.ExitStack):
    """One run directory from first step to report, as a context manager.

    Step 0 is the state before training; step n is the state after n steps. Used as

        with Session(config) as session:
            state = session.restore(state)
            for step in session.steps():
                …
                session.log(step, metrics, shown={"loss": "train/loss"})
                session.checkpoint(step, state)

    Args:
        config: validated configuration.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.stage = config.stage
        self.total_steps = config.total_steps
        self.run: RunDirectory = open_run(
            config.run_dir,
            _stored(config),
            stage=config.stage,
            resume=config.resume,
            free_on_resume=config.free_on_resume(),
            weights=_weights(config),
        )

    def __enter__(self) -> "Session":
        super().__enter__()
        self._overflowed: set[str] = set()  # metrics already warned about
        config, run = self.config, self.run
        self._checkpointer = self.enter_context(Checkpointer(run.checkpoints))
        self.start_step = self._first_step()
        self._interrupt = self.enter_context(Interruptible())
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
        if not self.config.resume:
            return 0
        if self.config.resume_step is not None:
            return self.config.resume_step
        return self._checkpointer.latest_step() or 0

    def restore(self, state: State) -> State:
        """`state`, or the checkpoint's when resuming, consuming it; opens the logs.

        Once the checkpoint is read, later checkpoints and then later log lines are
        removed: if killed in between, the next start finds everything it needs.
        """
        if self.start_step == 0:
            self._open_logs()
            return state
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # two states of a large model may not fit in memory
        state = self._checkpointer.restore(self.start_step, like)[0]
        self._checkpointer.remove_after(self.start_step)
        self._open_logs()
        return state

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
            self._checkpointer,
            skipped=int(sum(self.history("optim/skipped")[-1:])),
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
            skipped = float(self.check_finite.skipped)
            metrics = {**metrics, "optim/skipped": skipped}
        self._metrics.write(step, metrics)
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

    def save_and_raise(self, step: int, state: Any, error: ValueError) -> NoReturn:
        """Saves the state after `step` and raises the error, with how to resume."""
        if step == 0:
            raise error
        if (self._checkpointer.latest_step() or 0) < step:
            self._checkpointer.save(step, state, {"step": step})
            self._checkpointer.wait()
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
        if due or stop:
            self._checkpointer.save(step, state, {"step": step})
        if stop:
            self._checkpointer.wait()
            raise Interrupted(
                f"{self.stage} stopped after step {step} of {self.total_steps}; its "
                f"checkpoint is in {self.run.checkpoints}. Resume with: "
                f"{self._resume_command()}"
            )

    def report(self, **options: Any) -> None:
        """Writes the report of the run."""
        if jax.process_index() == 0:
            write_report(self.run.path, **options)
