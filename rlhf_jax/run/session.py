"""What surrounds every training loop: files, terminal, signals, checkpoints."""

import contextlib
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from rlhf_jax.algo.options import check
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import to_dict
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.learner.finite import NonFiniteError, pop_nonfinite
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.run.checkpoint import Checkpointer
from rlhf_jax.run.interrupt import Interruptible
from rlhf_jax.run.metrics import MetricsWriter, SamplesWriter, read_metrics
from rlhf_jax.run.progress import progress, warn
from rlhf_jax.run.remedy import remedy
from rlhf_jax.run.report import write_report
from rlhf_jax.run.run_directory import (
    MAY_DIFFER,
    RunDirectory,
    check_run,
    fingerprint,
    open_run,
)

State = TypeVar("State")


_MAY_DIFFER = (
    *MAY_DIFFER,
    # The remedy for a run that went astray.
    "optimizer.learning_rate",
    "actor_optimizer.learning_rate",
    "critic_optimizer.learning_rate",
    # The remedy for reward functions that fail.
    "reward_processes",
    "reward_time_limit",
    "reward_on_failure",
    # They change memory and time, and what is learnt by rounding only.
    "remat",
    "scan_layers",
    # What is written at the end.
    "lora.merge",
)

StageConfig = SFTConfig | RewardConfig | PPOConfig | GRPOConfig


def _free_options(config: StageConfig) -> tuple[str, ...]:
    """Options that a resumed run may change."""
    trains_policy = isinstance(config, PPOConfig | GRPOConfig)
    if trains_policy and config.policy_loss.mean_of_means:
        return _MAY_DIFFER
    if config.lora.dropout > 0:  # each microbatch draws its own
        return _MAY_DIFFER
    # As memory and time go; what is learnt changes by rounding only.
    return (*_MAY_DIFFER, "microbatches")


def _stored(config: StageConfig) -> dict[str, Any]:
    """What describes the run itself, and not this start of it."""
    values = to_dict(config)
    of_this_start = ("resume", "resume_step", "quiet")
    return {name: values[name] for name in values if name not in of_this_start}


def _weights(config: StageConfig) -> dict[str, str]:
    """Fingerprints of what the run reads and its checkpoints do not hold, by option."""
    if isinstance(config, SFTConfig | RewardConfig):
        paths = {"model": config.model if config.lora.is_on else None}
    else:
        has_reference = config.kl.place != "none"
        stands_on_policy = has_reference and config.reference is None
        paths = {
            "policy": config.policy if config.lora.is_on or stands_on_policy else None,
            "reference": config.reference,
            "reward-model": config.reward_model,
            **{f"ensemble {path}": path for path in config.ensemble},
        }
        if isinstance(config, PPOConfig) and config.lora.is_on:
            paths["critic"] = config.critic
        paths["lora.adapter"] = config.lora.adapter
    return {
        name: fingerprint(local_directory(path))
        for name, path in paths.items()
        if path is not None
    }


def check_start(config: StageConfig, *, stage: str) -> None:
    """Raises ValueError, before any work, where the run could not start."""
    config.validate()
    check_run(
        config.run_dir,
        _stored(config),
        stage=stage,
        resume=config.resume,
        may_differ=_free_options(config),
        weights=_weights(config),
    )
    if config.resume_step is not None:
        _check_saved(config.resume_step, RunDirectory(Path(config.run_dir)))


def _check_saved(step: int, run: RunDirectory) -> None:
    """Raises ValueError where there is no checkpoint of that step."""
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


def _rates(config: StageConfig) -> dict[str, float]:
    """Peak learning rates by flag, without the dashes."""
    if isinstance(config, PPOConfig):
        return {
            "actor-optimizer.learning-rate": config.actor_optimizer.learning_rate,
            "critic-optimizer.learning-rate": config.critic_optimizer.learning_rate,
        }
    return {"optimizer.learning-rate": config.optimizer.learning_rate}


class Interrupted(SystemExit):
    """The run was asked to stop; it did, and can be resumed."""


class Session(contextlib.ExitStack):
    """One run directory from first step to report, as a context manager.

    Step 0 is the state before training; step n is the state after n steps. Used as

        with Session(config, stage="sft", total_steps=config.steps) as session:
            state = session.restore(state)
            for step in session.steps():
                …
                session.log(step, metrics, shown={"loss": "train/loss"})
                session.checkpoint(step, state)

    Args:
        config: of the stage, validated.
        stage: the command's name.
        total_steps: of the whole run.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        stage: str,
        total_steps: int,
    ):
        super().__init__()
        self.config = config
        self.stage = stage
        self.total_steps = total_steps
        self.run: RunDirectory = open_run(
            config.run_dir,
            _stored(config),
            stage=stage,
            resume=config.resume,
            may_differ=_free_options(config),
            weights=_weights(config),
        )

    def __enter__(self) -> "Session":
        super().__enter__()
        self._overflowed: set[str] = set()  # metrics that a warning has named
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
        """The step after which this start goes on; 0: none."""
        if not self.config.resume:
            return 0
        if self.config.resume_step is not None:
            return self.config.resume_step
        return self._checkpointer.latest_step() or 0

    def restore(self, state: State) -> State:
        """`state`, or when resuming a checkpoint, which uses it up; opens the logs.

        Checkpoints of later steps are removed once that one has been read, and what was
        logged of those steps after that: killed in between, the next start finds
        nothing missing.
        """
        if self.start_step == 0:
            self._open_logs()
            return state
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # two states of a large model may not fit side by side
        state = self._checkpointer.restore(self.start_step, like)[0]
        self._checkpointer.remove_after(self.start_step)
        self._open_logs()
        return state

    def _open_logs(self) -> None:
        config, run = self.config, self.run
        # A resumed run has logged its first steps already; a fresh one logs from 0.
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

    def history(self, metric: str) -> list[float]:
        """What a metric was at the steps before this start, where it was logged."""
        if self.start_step == 0:
            return []
        return [row[metric] for row in read_metrics(self.run.metrics) if metric in row]

    def evaluation_is_missing(self) -> bool:
        """Whether held-out data was due after the last step before this start, but its
        metrics were not logged."""
        rows = read_metrics(self.run.metrics)
        last = [row for row in rows if row["step"] == self.start_step]
        is_there = any(name.startswith("eval/") for row in last for name in row)
        return self.is_eval_step(self.start_step) and not is_there

    def steps(self) -> range:
        """Numbers of the steps that are left."""
        return range(self.start_step + 1, self.total_steps + 1)

    def is_eval_step(self, step: int) -> bool:
        """Whether held-out data is due after this step."""
        return step % self.config.eval_every == 0 or step == self.total_steps

    def log(
        self, step: int, metrics: Mapping[str, float], *, shown: Mapping[str, str]
    ) -> None:
        """Writes a step's line; shows the metrics `shown` names, by label.

        A metric that is not finite is written as it is, and a warning names it, the
        first time only.
        """
        self._metrics.write(step, metrics)
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in self._overflowed:
                self._overflowed.add(name)
                why = "training goes on, as the loss and its gradients are finite"
                if name.startswith("eval/"):
                    why = "the weights may be ruined; training goes on"
                warn(f"step {step}: {name} is {float(value)}; {why} (said once)")
        found = {label: name for label, name in shown.items() if name in metrics}
        self._progress.update(
            step, {label: metrics[name] for label, name in found.items()}
        )

    def check_finite(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics without their `first_nonfinite/` entries, all of them fine.

        Raises:
            NonFiniteError: where one is set, saying how to go on. The state is not
                saved: earlier optimizer steps of the update may be in it, or it is what
                the loss fails of, and it would take the place of a good checkpoint.
        """
        try:
            return pop_nonfinite(metrics, step=step)
        except NonFiniteError as error:
            line = remedy(
                error,
                step=step,
                stage=self.stage,
                run_dir=self.run.path,
                saved=self._checkpointer.steps(),
                rates=_rates(self.config),
            )
            optimizer_step = error.optimizer_step
            raise NonFiniteError(line, optimizer_step=optimizer_step) from None

    def save_and_raise(self, step: int, state: Any, error: ValueError) -> NoReturn:
        """Saves the state after `step` and raises the error, saying how to go on."""
        if step == 0:
            raise error
        if (self._checkpointer.latest_step() or 0) < step:
            self._checkpointer.save(step, state, {"step": step})
            self._checkpointer.wait()
        raise type(error)(
            f"{error}. The run is saved after step {step}; when that is repaired, go "
            f"on with: {self._resume_command()}"
        ) from None

    def _resume_command(self) -> str:
        config = shlex.quote(str(self.run.config))
        return f"rlhf-jax {self.stage} --config {config} --resume"

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Writes prompts with answers."""
        self._samples.write(step, samples)

    def checkpoint(self, step: int, state: Any, *, last: bool = False) -> None:
        """Saves where a checkpoint is due, and stops the run where that was asked for.

        Args:
            step: its number.
            state: after it.
            last: the run ends here, before its last step.

        Raises:
            Interrupted: after saving, saying how to go on.
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
                f"checkpoint is in {self.run.checkpoints}. Go on with: "
                f"{self._resume_command()}"
            )

    def report(self, **options: Any) -> None:
        """Writes the report of the run."""
        if jax.process_index() == 0:
            write_report(self.run.path, **options)
