"""Training and held-out rows of a stage."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.config.supervised import SupervisedConfig
from rlhf_jax.data.batches import holdout
from rlhf_jax.data.text_data import TextRows
from rlhf_jax.run.progress import heading

Row = TypeVar("Row")


def read_reported(
    path: str, read: Callable[[str], TextRows[Row]], *, quiet: bool
) -> list[Row]:
    """The rows of a file; prints how many were dropped, and why."""
    found = read(path)
    for reason, count in found.dropped.items():
        heading(f"{path}: {count} rows dropped: {reason}", quiet=quiet)
    return found.rows


def read_split(
    config: SupervisedConfig | PolicyConfig,
    read: Callable[[str], TextRows[Row]],
    *,
    prompt_of: Callable[[Row], str],
) -> tuple[list[Row], list[Row]]:
    """Reads `data`, and `eval_data` or else holds out `eval_fraction` of the prompts.

    All rows of a prompt are on one side: held-out rows of training prompts would bias
    the metrics upwards.
    """
    rows = read_reported(config.data, read, quiet=config.quiet)
    if config.eval_data is not None:
        return rows, read_reported(config.eval_data, read, quiet=config.quiet)
    groups = [prompt_of(row) for row in rows]
    return hold_out_groups(rows, groups, config.eval_fraction, config.seed)


def hold_out_groups(
    rows: Sequence[Row], groups: Sequence[Hashable], fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; all rows of a group are on one side."""
    _, held_out = holdout(list(dict.fromkeys(groups)), fraction, seed)
    apart = set(held_out)
    pairs = list(zip(rows, groups, strict=True))
    return (
        [row for row, group in pairs if group not in apart],
        [row for row, group in pairs if group in apart],
    )
