"""Training rows and held-out rows of a stage."""

from collections.abc import Callable
from typing import TypeVar

from rlhf_jax.recipes.configs import PPOConfig, RewardConfig
from rlhf_jax.runtime.batches import holdout
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.text_data import TextRows

Row = TypeVar("Row")


def read_reported(
    path: str, read: Callable[[str], TextRows[Row]], *, quiet: bool
) -> list[Row]:
    """The rows of a file; says how many were left out, and why."""
    found = read(path)
    for reason, count in found.dropped.items():
        heading(f"{path}: {count} rows left out: {reason}", quiet=quiet)
    return found.rows


def read_split(
    config: RewardConfig | PPOConfig,
    read: Callable[[str], TextRows[Row]],
    *,
    prompt_of: Callable[[Row], str],
) -> tuple[list[Row], list[Row]]:
    """Reads `data`, and `eval_data` or else holds out `eval_fraction` of the prompts.

    All rows of a prompt are on one side: a held-out row of a known prompt would flatter
    the model.
    """
    rows = read_reported(config.data, read, quiet=config.quiet)
    if config.eval_data is not None:
        return rows, read_reported(config.eval_data, read, quiet=config.quiet)
    prompts = list(dict.fromkeys(prompt_of(row) for row in rows))
    _, held_out = holdout(prompts, config.eval_fraction, config.seed)
    apart = set(held_out)
    return (
        [row for row in rows if prompt_of(row) not in apart],
        [row for row in rows if prompt_of(row) in apart],
    )
