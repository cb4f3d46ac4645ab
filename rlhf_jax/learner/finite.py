"""Detects the first non-finite loss or gradient."""

import math
from collections.abc import Mapping
from typing import Any

TERMS = "terms/"
"""prefix of the losses and gradient norms of an update that must be finite"""


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


def first_nonfinite(metrics: Mapping[str, Any]) -> dict[str, int]:
    """First optimizer step of an update with a non-finite value, for each term, or -1.

    Args:
        metrics: of one update. Terms are `[N]`, one value per optimizer step, under
            `terms/<name>`.

    Returns:
        The step by name of the term.
    """
    return {
        name.removeprefix(TERMS): next(
            (step for step, value in enumerate(values) if not math.isfinite(value)), -1
        )
        for name, values in metrics.items()
        if name.startswith(TERMS)
    }


def pop_nonfinite(metrics: Mapping[str, Any], *, step: int) -> dict[str, Any]:
    """Metrics without the `terms/` entries; raises if one of those is not finite.

    Args:
        metrics: of one update, on the host.
        step: the update, for the message.

    Raises:
        NonFiniteError: naming the update, its optimizer step and the first non-finite
            term.
    """
    found = {n: first for n, first in first_nonfinite(metrics).items() if first >= 0}
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
    return {k: v for k, v in metrics.items() if not k.startswith(TERMS)}
