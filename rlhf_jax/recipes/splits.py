"""Training rows and held-out rows of a stage."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.config.supervised import RewardConfig
from rlhf_jax.data.batches import holdout
from rlhf_jax.data.text_data import TextRows
from rlhf_jax.run.progress import heading

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
    config: RewardConfig | PolicyConfig,
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
    groups = [prompt_of(row) for row in rows]
    return hold_out_groups(rows, groups, config.eval_fraction, config.seed)


def hold_out_groups(
    rows: Sequence[Row], groups: Sequence[Hashable], fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; rows of an equal group stay on one side."""
    _, held_out = holdout(list(dict.fromkeys(groups)), fraction, seed)
    apart = set(held_out)
    pairs = list(zip(rows, groups, strict=True))
    return (
        [row for row, group in pairs if group not in apart],
        [row for row, group in pairs if group in apart],
    )
