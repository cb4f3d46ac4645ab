"""Curves of proxy and true reward, and their turning points."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from rlhf_jax.algo.scores import EnsembleScore

THRESHOLD = 4.0
"""Standard errors by which the true reward must fall to count as a turn"""

TAIL = 3
"""Evaluations at the end of a curve that are compared to its peak"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Proxy and true reward as a policy moves away from its initialization.

    All lists have one entry per point. Means are over held-out prompts.
    """

    name: str
    method: Literal["ppo", "best-of-n"]
    scored_by: EnsembleScore | Literal["single"]  # the optimized score
    beta: float | None  # KL coefficient; None for best-of-n
    at: list[int]  # updates of PPO, or n
    kl: list[float]  # nats per response; for best-of-n the analytic bound
    proxy: list[float]  # the optimized score
    true: list[float]
    true_error: list[float]  # standard errors of `true`
    others: list[float] | None = None  # worst case of all models but the first

    @property
    def root_kl(self) -> list[float]:
        """√KL; an estimate below 0 counts as 0."""
        return [math.sqrt(max(kl, 0.0)) for kl in self.kl]

    @property
    def turn(self) -> int | None:
        """Index of the point where the true reward turns down, see `turning_point`."""
        return turning_point(self.true, self.true_error)


def turning_point(values: Sequence[float], errors: Sequence[float]) -> int | None:
    """Index of the peak of a curve that turns down significantly; else None.

    A curve turns down if the mean of its last three points is more than four standard
    errors of the difference below its highest point. Four, because the maximum of about
    twenty noisy points is about two standard errors too high; three points, because the
    last one may be low by chance. A curve whose highest point is one of the last three
    has not turned.

    Args:
        values: means, in order.
        errors: their standard errors; assumed independent.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(values) != len(errors):
        raise ValueError(f"{len(values)} values but {len(errors)} errors")
    if len(values) <= TAIL:
        return None
    peak = max(range(len(values)), key=values.__getitem__)
    if peak >= len(values) - TAIL:
        return None
    tail = math.fsum(values[-TAIL:]) / TAIL
    tail_variance = math.fsum(e * e for e in errors[-TAIL:]) / TAIL**2
    error = math.sqrt(errors[peak] ** 2 + tail_variance)
    return peak if values[peak] - tail > THRESHOLD * error else None


def stopping_point(values: Sequence[float], *, patience: int) -> int:
    """Index at which early stopping ends a run; the last index if it never does.

    This is the first point that ends a sequence of `patience` points without a new
    best.

    Args:
        values: the metric at each evaluation; at least one.
        patience: evaluations without a new best, at least 1.
    """
    best, since = -math.inf, 0
    for index, value in enumerate(values):
        best, since = (value, 0) if value > best else (best, since + 1)
        if since >= patience:
            return index
    return len(values) - 1


def best_before(values: Sequence[float], stop: int) -> int:
    """Index of the highest value up to `stop`: the policy that early stopping keeps."""
    return max(range(stop + 1), key=values.__getitem__)
