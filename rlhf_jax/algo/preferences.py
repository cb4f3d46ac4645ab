"""The loss that turns human preferences into a reward model."""

from numbers import Real

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar


def preference_loss(
    chosen_scores: Array,
    rejected_scores: Array,
    *,
    margin: Array | None = None,
    label_smoothing: Scalar = 0.0,
) -> Array:
    """Bradley–Terry negative log-likelihood of each preference.

        d = s_chosen − s_rejected − margin
        L = −(1 − α) · log σ(d) − α · log σ(−d)

    Args:
        chosen_scores: `[N]` float, of the answers that were preferred.
        rejected_scores: `[N]` float.
        margin: `[N]` float, by how much the scores should differ; 0 by default.
        label_smoothing: α, the probability that a label is wrong, in [0, 0.5).

    Returns:
        `[N]` float32, unreduced, differentiable in both scores.

    Raises:
        ValueError: when a `label_smoothing` given as a number is outside
            [0, 0.5).
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        Ouyang et al., 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al., 2023,
        arXiv:2307.09288, eq. 2.
    """
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    chex.assert_type([chosen_scores, rejected_scores], float)
    if isinstance(label_smoothing, Real) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: expected in [0, 0.5)")
    gap = chosen_scores.astype(jnp.float32) - rejected_scores.astype(jnp.float32)
    if margin is not None:
        chex.assert_equal_shape([margin, gap])
        chex.assert_type(margin, float)
        gap = gap - margin.astype(jnp.float32)
    label_smoothing = jnp.asarray(label_smoothing, jnp.float32)
    right = (1.0 - label_smoothing) * jax.nn.softplus(-gap)
    return right + label_smoothing * jax.nn.softplus(gap)
