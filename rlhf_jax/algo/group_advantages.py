"""Advantages without a critic: each answer against the others to its prompt."""

from collections.abc import Callable
from typing import Literal

import chex
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar


def group_advantages(
    scores: Array,
    group_ids_or_size: Array | int,
    *,
    scale: Literal["std", "none"] = "std",
    baseline: Literal["mean", "leave-one-out"] = "mean",
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Array:
    """Scores relative to their group, the answers to one prompt.

    With μ, σ the mean and standard deviation over the n scores of a group:

    ==========  =================  ==============================  ==================
    `scale`     `baseline`         A                               known as
    ==========  =================  ==============================  ==================
    `"std"`     `"mean"`           (s − μ) / (σ + eps)             GRPO
    `"none"`    `"mean"`           s − μ                           Dr. GRPO
    `"none"`    `"leave-one-out"`  n/(n−1) · (s − μ), that is s    RLOO
                                   − the mean of the others
    `"std"`     `"leave-one-out"`  n/(n−1) · (s − μ) / (σ + eps)
    ==========  =================  ==============================  ==================

    They sum to 0 over a group. A group of one has nothing to compare with and gets 0,
    and so does a group whose scores are all equal.

    Args:
        scores: `[B]` float, one per answer.
        group_ids_or_size: an int G: answers g·G … g·G + G − 1 form group g. Or ids,
            `[B]` integer of any values: equal ids form a group, of any size and
            order. Ids compare all pairs, which takes B² bools, and need a mesh with
            auto axes or an unsharded batch.
        scale: divide by the group's standard deviation or not.
        baseline: the mean of the group, or of the other answers.
        ddof: σ² divides by n − ddof; 1 as in TRL, verl and OpenRLHF.
        eps: added to σ, positive; bounds what nearly equal scores can become.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: when G does not divide B, or on an unknown option.
        AssertionError: on a wrong rank or dtype.

    References:
        Shao et al., 2024, arXiv:2402.03300, section 4.1; Liu et al., 2025,
        arXiv:2503.20783; Ahmadian et al., 2024, arXiv:2402.14740, eq. 8.
    """
    chex.assert_rank(scores, 1)
    chex.assert_type(scores, float)
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r}: expected 'std' or 'none'")
    if baseline not in ("mean", "leave-one-out"):
        raise ValueError(f"baseline={baseline!r}: expected 'mean' or 'leave-one-out'")
    scores = scores.astype(jnp.float32)
    group_sum = _group_sum(scores, group_ids_or_size)
    count = group_sum(jnp.ones_like(scores))  # [B]

    centred = scores - group_sum(scores) / count
    # Once more: the rounding error of a large mean would look like a difference.
    centred = centred - group_sum(centred) / count
    advantages = centred
    if baseline == "leave-one-out":
        advantages = centred * count / jnp.maximum(count - 1.0, 1.0)
    if scale == "std":
        # From the centred scores: E s² − μ² cancels when they are nearly equal.
        variance = group_sum(jnp.square(centred)) / jnp.maximum(count - ddof, 1.0)
        advantages = advantages / (jnp.sqrt(variance) + eps)
    return advantages


def _group_sum(
    scores: Array, group_ids_or_size: Array | int
) -> Callable[[Array], Array]:
    """Maps `[B]` to `[B]`: at every answer the sum over its group."""
    batch = scores.shape[0]
    if isinstance(group_ids_or_size, int):
        size = group_ids_or_size
        if size < 1 or batch % size:
            raise ValueError(
                f"group size {size}: expected a divisor of the {batch} scores"
            )

        def contiguous(x: Array) -> Array:
            groups = x.reshape(batch // size, size)
            sums = jnp.sum(groups, axis=1, keepdims=True)
            return jnp.broadcast_to(sums, groups.shape).reshape(batch)

        return contiguous

    ids = group_ids_or_size
    chex.assert_shape(ids, (batch,))
    chex.assert_type(ids, int)
    same = ids[:, None] == ids[None, :]  # [B, B]
    return lambda x: jnp.sum(jnp.where(same, x[None, :], 0.0), axis=1)
