"""Where a resumed run continues, and whether everything it needs is unchanged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.algo.options import check
from rlhf_jax.config.run import RunConfig
from rlhf_jax.files.typed_fields import section
from rlhf_jax.run.checkpointer import Checkpointer
from rlhf_jax.run.fingerprints import check_unchanged, fingerprints
from rlhf_jax.run.log_files import read_metrics, read_samples
from rlhf_jax.run.progress import warn
from rlhf_jax.run.run_directory import RunDirectory


def check_resume(config: RunConfig, run: RunDirectory) -> None:
    """Raises ValueError, before any work, if the run cannot continue.

    Checks the latest checkpoint, or that of `resume_step`, without its arrays.
    """
    with Checkpointer(run.checkpoints) as checkpointer:
        saved, wanted = checkpointer.steps(), config.resume_step
        if wanted is not None:
            check(
                wanted in saved,
                "resume-step",
                wanted,
                f"has no checkpoint in {run.checkpoints}; there are: {_listed(saved)}",
            )
            _check_whole(checkpointer, wanted, run.checkpoints)
        step = wanted if wanted is not None else _latest_readable(checkpointer)
        if step > 0:
            now = fingerprints(config)
            check_fingerprints(config, run, checkpointer, step, now)
            check_history(config, run, saved, step)
        elif not saved:
            _check_none_was_saved(config, run)
        if jax.process_index() == 0 and run.samples.exists():
            read_samples(run.samples)  # the run would stop at a wrong line later


def choose_checkpoint(checkpointer: Checkpointer, run: RunDirectory) -> int:
    """The latest checkpoint whose files match their checksums; 0: there is none.

    Warns of every damaged one that is passed over. Every JAX process gets the same
    step, from process 0.

    Raises:
        ValueError: if there are checkpoints, and all are damaged.
    """
    chosen, reasons = 0, []
    saved = checkpointer.steps()
    if jax.process_index() == 0:
        for step in reversed(saved):
            reason = checkpointer.damage(step)
            if reason is None:
                chosen = step
                break
            reasons.append(f"checkpoint {step} is damaged ({reason})")
            if step != saved[0]:
                warn(f"{reasons[-1]}; using the one before")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
    if saved and chosen == 0:
        raise ValueError(
            f"cannot resume --run-dir {run.path}: {'; '.join(reasons)}; no other "
            "checkpoint is left, so start a new run"
        )
    return chosen


def check_fingerprints(
    config: RunConfig,
    run: RunDirectory,
    checkpointer: Checkpointer,
    step: int,
    now: Mapping[str, str],
) -> list[str]:
    """What changed since the checkpoint and is accepted, as lines to warn with.

    Args:
        config: configuration of the run.
        run: its directory.
        checkpointer: its checkpoints.
        step: the checkpoint.
        now: fingerprints of what the run reads.

    Raises:
        ValueError: if something else that the run reads has changed.
    """
    if jax.process_index() != 0:
        return []
    saved = section(checkpointer.data(step), "fingerprints")
    changed = check_unchanged(
        saved, now, accepted=config.accept_changed, run_dir=run.path
    )
    return [
        f"{name} changed since checkpoint {step}: {saved[name]}, now {now[name]}"
        for name in changed
    ]


def check_history(
    config: RunConfig, run: RunDirectory, saved: Sequence[int], step: int
) -> None:
    """Raises ValueError if metrics.jsonl lacks a step before the checkpoint's."""
    if jax.process_index() != 0 or "history" in config.accept_changed:
        return
    accept = "accept the gap with --accept-changed history"
    try:
        rows = read_metrics(run.metrics) if run.metrics.exists() else []
    except ValueError as error:
        raise ValueError(
            f"{error}; restore what was there, or delete it and {accept}"
        ) from None
    missing = sorted(set(range(step + 1)) - {row["step"] for row in rows})
    if not missing:
        return
    earlier = [number for number in saved if number < missing[0]]
    back = f"go back with --resume-step {earlier[-1]}, " if earlier else ""
    count = "one step" if len(missing) == 1 else f"{len(missing)} steps"
    raise ValueError(
        f"cannot resume --run-dir {run.path}: metrics.jsonl lacks {count} up to "
        f"checkpoint {step}, from step {missing[0]}; restore it, {back}or {accept}"
    )


def _check_none_was_saved(config: RunConfig, run: RunDirectory) -> None:
    """Raises ValueError if the logs show that there were checkpoints.

    Starting over would remove the logs. The checkpoint after `checkpoint_every` steps
    is complete before the next one is begun.
    """
    if "history" in config.accept_changed or not run.metrics.exists():
        return
    steps = [row["step"] for row in read_metrics(run.metrics)]
    every = run.read_config().get("checkpoint_every")
    if isinstance(every, int) and max(steps, default=0) > 2 * every:
        raise ValueError(
            f"cannot resume --run-dir {run.path}: metrics.jsonl has {max(steps)} "
            f"steps, but {run.checkpoints} has no checkpoint; restore it, start a new "
            "run, or start this one over with --accept-changed history"
        )


def _latest_readable(checkpointer: Checkpointer) -> int:
    """The latest checkpoint with metadata; 0: there is none."""
    for step in reversed(checkpointer.steps()):
        try:
            checkpointer.data(step)
        except ValueError:
            continue
        return step
    return 0


def _check_whole(checkpointer: Checkpointer, step: int, directory: Path) -> None:
    reason = checkpointer.damage(step)
    others = [number for number in checkpointer.steps() if number != step]
    check(
        reason is None,
        "resume-step",
        step,
        f"is damaged in {directory} ({reason}); others: {_listed(others)}",
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
