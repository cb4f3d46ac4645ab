"""Scores brought to mean 0 and variance 1 by what was seen so far."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar, record


@record
class ScoreMoments:
    """Count, mean and sum of squared deviations of all scores seen."""

    count: Array  # [] float32
    mean: Array  # [] float32
    squares: Array  # [] float32, Σ (s − mean)²


def init_score_moments() -> ScoreMoments:
    """Nothing seen yet.

    Returns:
        Zeros, each a buffer of its own, so that a state that holds them can be donated.
    """
    count, mean, squares = (jnp.zeros((), jnp.float32) for _ in range(3))
    return ScoreMoments(count=count, mean=mean, squares=squares)


def update_score_moments(moments: ScoreMoments, scores: Array) -> ScoreMoments:
    """The moments of what was seen before and of one batch more.

        n = n_a + n_b        δ = μ_b − μ_a
        μ = μ_a + δ · n_b / n
        M = M_a + M_b + δ² · n_a · n_b / n

    Args:
        moments: of the scores before.
        scores: `[B]` float.

    Returns:
        Of all of them.

    Raises:
        AssertionError: on a wrong rank or dtype.

    References:
        Chan, Golub and LeVeque, 1983, The American Statistician 37(3), eq. 2.1.
    """
    chex.assert_rank(scores, 1)
    chex.assert_type(scores, float)
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    batch = jnp.asarray(scores.shape[0], jnp.float32)
    batch_mean = jnp.mean(scores)
    delta = batch_mean - moments.mean
    count = moments.count + batch
    between = jnp.square(delta) * moments.count * batch / count
    return ScoreMoments(
        count=count,
        mean=moments.mean + delta * batch / count,
        squares=moments.squares + jnp.sum(jnp.square(scores - batch_mean)) + between,
    )


def normalize_scores(
    scores: Array, moments: ScoreMoments, *, eps: Scalar = 1e-8
) -> Array:
    """(s − μ) / √(σ² + eps), with σ² = M / n.

    With the moments of the reference's answers, held fixed, this is the gain and bias
    of lm-human-preferences; with moments updated at every batch it is a running
    normalisation. Either makes β and the value clip mean the same under reward models
    of different scale.

    Args:
        scores: `[B]` float.
        moments: of at least two different scores.
        eps: added to the variance.

    Returns:
        `[B]` float32.

    Raises:
        AssertionError: on a wrong rank or dtype.

    References:
        Ziegler et al., 2019, arXiv:1909.08593, section 2.1.
    """
    chex.assert_rank(scores, 1)
    chex.assert_type(scores, float)
    centred = scores.astype(jnp.float32) - moments.mean
    return centred * jax.lax.rsqrt(_variance(moments) + jnp.asarray(eps, jnp.float32))


def score_std(moments: ScoreMoments) -> Array:
    """`[]` float32: σ = √(M / n), 0 where nothing was seen."""
    return jnp.sqrt(_variance(moments))


def _variance(moments: ScoreMoments) -> Array:
    return moments.squares / jnp.maximum(moments.count, 1.0)
