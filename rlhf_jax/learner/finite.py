"""Detects the first non-finite loss or gradient."""

from collections.abc import Mapping

import jax.numpy as jnp

from rlhf_jax.algo.types import Array

PREFIX = "first_nonfinite/"


class NonFiniteError(RuntimeError):
    """A term of the loss or the norm of a gradient was NaN or infinite.

    That optimizer step was not taken.

    Args:
        message: the problem, in one line.
        optimizer_step: the optimizer step within the update, from 0.
    """

    def __init__(self, message: str, *, optimizer_step: int = 0):
        super().__init__(message)
        self.optimizer_step = optimizer_step


def first_nonfinite(terms: Mapping[str, Array]) -> dict[str, Array]:
    """First optimizer step of an update with a non-finite value, for each term, or -1.

    Args:
        terms: `[N]` values by name, one per optimizer step.

    Returns:
        `[]` int32 by `first_nonfinite/<name>`.
    """

    def first(values: Array) -> Array:
        bad = ~jnp.isfinite(values)
        return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)

    return {PREFIX + name: first(values) for name, values in terms.items()}


def pop_nonfinite(metrics: dict[str, float], *, step: int) -> dict[str, float]:
    """Metrics without the `first_nonfinite/` entries; raises if one is set.

    Args:
        metrics: Python numbers of one update.
        step: the update, for the message.

    Raises:
        NonFiniteError: naming the update, its optimizer step and the first non-finite
            term.
    """
    found = {
        name.removeprefix(PREFIX): int(value)
        for name, value in metrics.items()
        if name.startswith(PREFIX) and value >= 0
    }
    if found:
        # The earliest is the cause. Within a step, the loss of one network comes before
        # its consequences: the total, and the gradients.
        order = ("policy_loss", "value_loss", "loss", "total_loss")
        rank = {name: number for number, name in enumerate(order)}
        late = {"actor_gradient", "critic_gradient", "gradient"}
        term = min(
            found,
            key=lambda name: (found[name], name in late, rank.get(name, len(rank))),
        )
        raise NonFiniteError(
            f"step {step}: {term} is not finite (optimizer step {found[term]} of this "
            "update, counted from 0); neither that step nor a later one was taken",
            optimizer_step=found[term],
        )
    return {k: v for k, v in metrics.items() if not k.startswith(PREFIX)}
