"""Critic-free advantages: each response relative to the others to its prompt."""

from numbers import Integral
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar


def group_advantages(
    scores: Array,
    groups: Array | int,
    *,
    scale: Literal["std", "batch-std", "none"] = "none",
    baseline: Literal["mean", "leave-one-out", "none"] = "leave-one-out",
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Array:
    """Scores relative to their group, the responses to one prompt.

    With μ, σ the mean and standard deviation over the n scores of a group, and σ_B the
    standard deviation over all scores of the batch:

    =============  =================  ===========================  ====================
    `scale`        `baseline`         A                            known as
    =============  =================  ===========================  ====================
    `"std"`        `"mean"`           (s − μ) / (σ + eps)          GRPO
    `"batch-std"`  `"mean"`           (s − μ) / (σ_B + eps)        `scale_rewards=batch`
                                                                   of TRL
    `"none"`       `"mean"`           s − μ                        Dr. GRPO
    `"none"`       `"leave-one-out"`  n/(n−1) · (s − μ), that is   RLOO
                                      s − the mean of the others
    `"none"`       `"none"`           s                            REINFORCE
    =============  =================  ===========================  ====================

    and `"leave-one-out"` can be divided by σ or σ_B as well. Except for the last row,
    advantages sum to 0 over a group; a group of one gets 0, and so does a group whose
    scores have zero variance.

    Which to choose: RLOO has the exact policy gradient in expectation, and so has Dr.
    GRPO up to the factor (n − 1)/n. Dividing by σ changes its direction for graded
    scores. For scores of 0 or 1 it only reweights the prompts: equally for n = 2 and 3,
    and for n ≥ 4 the more, the closer a prompt is to always or never solved, which may
    be intended. σ_B sets a common scale and has a smaller error. Use both with scores
    without a KL penalty: if scores have zero variance, the KL would be scaled to 1.

    Args:
        scores: `[B]` float, one per response.
        groups: an int G: responses g·G … g·G + G − 1 form group g. Or ids, `[B]`
            integer of any values: equal ids form a group, of any size and order. Ids
            compare all pairs, which takes B² bools, and need a mesh with auto axes or
            an unsharded batch.
        scale: divide by the group's standard deviation, the batch's, or not at all.
        baseline: the mean of the group, of the other responses, or 0.
        ddof: σ² divides by n − ddof, σ_B² by B − ddof; 1 as in TRL, verl and OpenRLHF.
        eps: added to σ or σ_B, positive; bounds the advantages of nearly equal scores.

    Returns:
        `[B]` float32, without a gradient.

    Raises:
        ValueError: if G does not divide B, an option is unknown, or `scale` is used
            without a baseline: scores with zero variance would be divided by `eps`.
        AssertionError: on a wrong rank or dtype.

    References:
        Shao et al., 2024, arXiv:2402.03300, section 4.1; Liu et al., 2025,
        arXiv:2503.20783; Ahmadian et al., 2024, arXiv:2402.14740, eq. 8; σ_B: Liu et
        al., 2025, arXiv:2508.08221.
    """
    _check_options(scores, scale, baseline)
    # Advantages are constants for the loss, and √ has no derivative at zero variance.
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    eps = jnp.asarray(eps, jnp.float32)
    if baseline == "none":
        return scores
    advantages = center_in_groups(scores, groups)
    if baseline == "leave-one-out":
        count = group_sum(jnp.ones_like(scores), groups)
        advantages = advantages * count / jnp.maximum(count - 1.0, 1.0)
    if scale == "std":
        std = group_std(scores, groups, ddof=ddof)
        advantages = advantages / (std + eps)
    elif scale == "batch-std":
        deviations = scores - jnp.mean(scores)
        deviations = deviations - jnp.mean(deviations)  # as in `center_in_groups`
        squares = jnp.sum(jnp.square(deviations))
        advantages = advantages / (_root(squares, scores.size - ddof) + eps)
    return advantages


def center_in_groups(
    scores: Array, groups: Array | int, weights: Array | None = None
) -> Array:
    """Scores minus their group's mean.

    Args:
        scores: `[B]` float32.
        groups: see `group_advantages`.
        weights: `[B]` float32, not negative, of a weighted mean; 1 by default. The mean
            of a group with zero total weight is 0.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: when a group size does not divide B.
    """
    weights = jnp.ones_like(scores) if weights is None else weights
    total = group_sum(weights, groups)
    total = jnp.where(total > 0, total, 1.0)
    centred = scores - group_sum(weights * scores, groups) / total
    # Again: the rounding error of a large mean would look like a difference.
    return centred - group_sum(weights * centred, groups) / total


def group_sum(x: Array, groups: Array | int) -> Array:
    """For each response, the sum over its group.

    Args:
        x: `[B]` float32.
        groups: see `group_advantages`.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: when a group size does not divide B.
    """
    if isinstance(groups, int | Integral):
        size = _check_size(int(groups), x.shape[0])
        rows = x.reshape(-1, size)
        sums = jnp.sum(rows, axis=1, keepdims=True)
        return jnp.broadcast_to(sums, rows.shape).reshape(x.shape)
    same = _same_group(groups, x.shape[0])
    return jnp.sum(jnp.where(same, x[None, :], 0.0), axis=1)


def group_std(scores: Array, groups: Array | int, *, ddof: int = 1) -> Array:
    """For each response, the standard deviation of its group.

    Args:
        scores: `[B]` float32.
        groups: see `group_advantages`.
        ddof: squares are divided by max(n − ddof, 1).

    Returns:
        `[B]` float32; exactly 0 where all scores of a group are equal.

    Raises:
        ValueError: when a group size does not divide B.
    """
    # From centered scores: E s² − μ² cancels if they are nearly equal.
    centred = center_in_groups(scores, groups)
    squares = group_sum(jnp.square(centred), groups)
    count = group_sum(jnp.ones_like(scores), groups)
    return _root(squares, count - jnp.asarray(ddof, jnp.float32))


def largest_of_others(x: Array, groups: Array | int) -> Array:
    """For each response, the largest x of the other responses in its group.

    Args:
        x: `[B]` float32.
        groups: see `group_advantages`.

    Returns:
        `[B]` float32; −inf in a group of one.

    Raises:
        ValueError: when a group size does not divide B.
    """
    if isinstance(groups, int | Integral):
        size = _check_size(int(groups), x.shape[0])
        rows = x.reshape(-1, 1, size)  # [B/G, 1, G], against [G, G]
        others = ~jnp.eye(size, dtype=bool)[None]
        largest = jnp.max(jnp.where(others, rows, -jnp.inf), axis=2)
        return largest.reshape(x.shape)
    same = _same_group(groups, x.shape[0])
    others = same & ~jnp.eye(x.shape[0], dtype=bool)
    return jnp.max(jnp.where(others, x[None, :], -jnp.inf), axis=1)


def _check_options(scores: Array, scale: str, baseline: str) -> None:
    chex.assert_rank(scores, 1)
    chex.assert_type(scores, float)
    if scale not in ("std", "batch-std", "none"):
        raise ValueError(f"scale={scale!r}: expected 'std', 'batch-std' or 'none'")
    if baseline not in ("mean", "leave-one-out", "none"):
        raise ValueError(
            f"baseline={baseline!r}: expected 'mean', 'leave-one-out' or 'none'"
        )
    if baseline == "none" and scale != "none":
        raise ValueError(f"scale={scale!r}: expected 'none' with baseline='none'")


def _root(squares: Array, freedom: Scalar) -> Array:
    return jnp.sqrt(squares / jnp.maximum(jnp.asarray(freedom, jnp.float32), 1.0))


def _check_size(size: int, batch: int) -> int:
    if size < 1 or batch % size:
        raise ValueError(f"group size {size}: expected a divisor of the {batch} scores")
    return size


def _same_group(ids: Array, batch: int) -> Array:
    """`[B, B]` bool: whether two responses are in the same group."""
    chex.assert_shape(ids, (batch,))
    chex.assert_type(ids, int)
    return ids[:, None] == ids[None, :]


def opo_advantages(scores: Array, lengths: Array, groups: Array | int) -> Array:
    """OPO: s − Σ len·s / Σ len over the group, the minimum-variance baseline.

    The optimal baseline weights scores by squared gradient norms; if token gradients
    are similar and orthogonal, these are proportional to length. Use it for on-policy
    training with responses of very different lengths. A group of one gets 0.

    The baseline includes the response's own score, so the expected gradient is biased:
    unlike for the mean baseline, the bias is not a constant factor.

    Args:
        scores: `[B]` float.
        lengths: `[B]` integer, response tokens.
        groups: a group size, or `[B]` integer ids.

    Returns:
        `[B]` float32; Σ len·A = 0 over a group.

    Raises:
        ValueError: when a group size does not divide B.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Hao et al., 2025, arXiv:2505.23585.
    """
    chex.assert_rank([scores, lengths], 1)
    chex.assert_equal_shape([scores, lengths])
    chex.assert_type([scores, lengths], [float, int])
    weights = lengths.astype(jnp.float32)
    centred = center_in_groups(scores.astype(jnp.float32), groups, weights)
    return jax.lax.stop_gradient(centred)


def gpg_advantages(
    scores: Array,
    groups: Array | int,
    *,
    scale: Literal["std", "none"] = "none",
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Array:
    """GPG: (s − group mean) · α / F, where α compensates for groups with zero variance.

        α = B / (responses in groups whose scores differ)        F = 1 or σ + eps

    If half of the groups are always or never solved, the gradient is half as large; α
    restores its size. Use with `reinforce_loss`. α counts groups with nonzero variance,
    as in the paper and its code; verl divides by the number of nonzero scores instead,
    so a fully solved group counts.

    Args:
        scores: `[B]` float.
        groups: a group size, or `[B]` integer ids.
        scale: F; `"none"` is F = 1, the paper's choice.
        ddof: σ² divides by n − ddof.
        eps: added to σ.

    Returns:
        `[B]` float32; 0 in a group of one or of equal scores.

    Raises:
        ValueError: when a group size does not divide B, or on an unknown scale.
        AssertionError: on a wrong rank or dtype.

    References:
        Chu et al., 2025, arXiv:2504.02546, and the authors' code, AMAP-ML/GPG.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r}: expected 'std' or 'none'")
    advantages = group_advantages(
        scores, groups, scale=scale, baseline="mean", ddof=ddof, eps=eps
    )
    scores = scores.astype(jnp.float32)
    below_best = scores < largest_of_others(scores, groups)
    differ = group_sum(below_best.astype(jnp.float32), groups) > 0
    alpha = scores.shape[0] / jnp.maximum(jnp.sum(differ.astype(jnp.float32)), 1.0)
    return jax.lax.stop_gradient(alpha * advantages)
