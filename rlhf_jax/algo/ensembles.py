"""One score from several reward models."""

from numbers import Real
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar

EnsembleScore = Literal["mean", "worst", "mean-minus-std"]


def combine_scores(
    scores: Array, *, how: EnsembleScore = "mean", penalty: Scalar = 1.0
) -> Array:
    """What K reward models say of each answer, as one score.

        mean              Σ_k s_k / K
        worst             min_k s_k
        mean-minus-std    mean − λ · √(Σ_k (s_k − mean)² / K)

    Models that learned from the same judgements agree where these are and differ where
    they had to guess, which is where a policy goes that is paid for their errors. The
    mean averages errors out; the other two also charge for disagreement. What all
    models get wrong alike, none of the three can see.

    Preferences fix scores only up to a constant, so the models need a common zero:
    train them with `center_coef`, or subtract each one's mean on the same answers.

    Args:
        scores: `[K, B]` float, one row per reward model.
        how: mean, worst or mean-minus-std.
        penalty: λ of mean-minus-std; the others do not read it.

    Returns:
        `[B]` float32, without a gradient. For K = 1 all three are that model's score.

    Raises:
        ValueError: when `how` is none of the three, or a `penalty` given as a number is
            negative or NaN.
        AssertionError: on a wrong rank or dtype.

    References:
        Coste et al., 2023, arXiv:2310.02743, section 3 (whose penalty is on the
        variance); mean minus standard deviation: Eisenstein et al., 2023,
        arXiv:2312.09244.
    """
    chex.assert_rank(scores, 2)
    chex.assert_type(scores, float)
    if how not in get_args(EnsembleScore):
        choices = ", ".join(get_args(EnsembleScore))
        raise ValueError(f"how={how!r}: expected one of {choices}")
    if isinstance(penalty, Real) and not penalty >= 0:
        raise ValueError(f"penalty={penalty}: expected 0 or more")
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    if how == "worst":
        return jnp.min(scores, axis=0)
    mean = jnp.mean(scores, axis=0)
    if how == "mean":
        return mean
    return mean - jnp.asarray(penalty, jnp.float32) * jnp.std(scores, axis=0)
