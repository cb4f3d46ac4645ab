"""Suggests how to recover from a loss or gradient that is not finite."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.learner.finite import NonFiniteError

RATE_SHARE = 0.1
"""factor for a learning rate at which a run diverged"""
HIGHEST_RATE = 0.01
"""the most that is suggested: AdamW moves each weight by about the rate per step"""


def remedy(
    error: NonFiniteError,
    *,
    step: int,
    stage: str,
    run_dir: Path,
    saved: Sequence[int],
    rates: Mapping[str, float],
) -> str:
    """The error in one line, and the command to resume, if possible.

    If a step failed in its first optimizer step, resuming from the checkpoint right
    before it fails again: same weights, same batch. If it failed in a later one, a
    lower learning rate changes the steps before.

    Args:
        error: error that occurred.
        step: step that failed.
        stage: command of the run.
        run_dir: run directory.
        saved: steps of its checkpoints, all before `step`.
        rates: learning rates by flag, without the dashes.
    """
    at_once = error.optimizer_step == 0
    if step == 1 and at_once:
        return (
            f"{error}. It is the first optimizer step of the run, so the learning rate "
            "is not the cause: check the data and the initial weights"
        )
    command = f"rlhf-jax {stage} --config {shlex.quote(str(run_dir / 'config.yaml'))}"
    lower = [
        f"--{name} {min(rate * RATE_SHARE, HIGHEST_RATE):.6g}"
        for name, rate in rates.items()
    ]
    useful = sorted(number for number in saved if number < step - 1 or not at_once)
    if not useful:
        found = "none was saved"
        if saved:
            found = f"that of step {saved[-1]} would fail again"
        suffix = "-2" if str(run_dir).endswith("-lower-rate") else "-lower-rate"
        anew = f"--run-dir {shlex.quote(f'{run_dir}{suffix}')}"
        return (
            f"{error}. There is no checkpoint to resume from: {found}. Restart with "
            f"a lower learning rate: {' '.join([command, anew, *lower])}"
        )
    *earlier, newest = useful
    resume = f"--resume --resume-step {newest}"
    return (
        f"{error}. {_if_that_fails(earlier)}Resume from checkpoint {newest} "
        f"with a lower learning rate: {' '.join([command, resume, *lower])}"
    )


def _if_that_fails(earlier: Sequence[int]) -> str:
    then = "restart in a new --run-dir"
    if earlier:
        then = f"use an earlier --resume-step (there are: {_listed(earlier)})"
    return f"If the next command fails too, earlier weights were corrupted: {then}. "


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
