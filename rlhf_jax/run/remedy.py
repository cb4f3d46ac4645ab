"""What to do about a run whose loss or gradient is no longer a number."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.learner.finite import NonFiniteError

RATE_SHARE = 0.1
"""what is left of a learning rate under which a run went astray"""


def remedy(
    error: NonFiniteError,
    *,
    step: int,
    stage: str,
    run_dir: Path,
    saved: Sequence[int],
    rates: Mapping[str, float],
) -> str:
    """The error in one line, and the command that goes on where one can.

    The checkpoint right before a step that failed at once is of no use: the same
    weights would meet the same batch. A step that failed at a later optimizer step has
    taken some at the rate that can be changed.

    Args:
        error: what was found.
        step: the step that failed.
        stage: the command.
        run_dir: of the run.
        saved: steps of its checkpoints, all before `step`.
        rates: learning rates by flag, without the dashes.
    """
    at_once = error.optimizer_step == 0
    if step == 1 and at_once:
        return (
            f"{error}. It is the first optimizer step of the run, so no learning rate "
            "has done that: look at the data, and at the weights that the run starts "
            "from"
        )
    command = f"rlhf-jax {stage} --config {shlex.quote(str(run_dir / 'config.yaml'))}"
    lower = [f"--{name} {rate * RATE_SHARE:.6g}" for name, rate in rates.items()]
    useful = sorted(number for number in saved if number < step - 1 or not at_once)
    if not useful:
        found = "none has been saved"
        if saved:
            found = f"from that of step {saved[-1]} it would fail again"
        suffix = "-2" if str(run_dir).endswith("-lower-rate") else "-lower-rate"
        anew = f"--run-dir {shlex.quote(f'{run_dir}{suffix}')}"
        return (
            f"{error}. There is no checkpoint to go on from: {found}. Start again with "
            f"a lower learning rate: {' '.join([command, anew, *lower])}"
        )
    *earlier, newest = useful
    resume = f"--resume --resume-step {newest}"
    return (
        f"{error}. {_if_that_fails(earlier)}Go on from the checkpoint of step {newest} "
        f"with a lower learning rate: {' '.join([command, resume, *lower])}"
    )


def _if_that_fails(earlier: Sequence[int]) -> str:
    then = "start again in a new --run-dir"
    if earlier:
        then = f"take an earlier --resume-step (there are: {_listed(earlier)})"
    return f"If what follows fails again, the weights were ruined before: {then}. "


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
