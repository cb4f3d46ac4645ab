"""Score normalization by running statistics, and other score transformations."""

from numbers import Real
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.rewards import MissingEOS
from rlhf_jax.algo.types import Array, Scalar, record


@record
class ScoreMoments:
    """Count, mean and sum of squared deviations of all scores seen."""

    count: Array  # [] float32
    mean: Array  # [] float32
    squares: Array  # [] float32, Σ (s − mean)²


def init_score_moments() -> ScoreMoments:
    """Empty running statistics.

    Returns:
        Zeros in separate buffers, so that a state that contains them can be donated.
    """
    count, mean, squares = (jnp.zeros((), jnp.float32) for _ in range(3))
    return ScoreMoments(count=count, mean=mean, squares=squares)


def update_score_moments(moments: ScoreMoments, scores: Array) -> ScoreMoments:
    """Updates the moments with one batch.

        n = n_a + n_b        δ = μ_b − μ_a
        μ = μ_a + δ · n_b / n
        M = M_a + M_b + δ² · n_a · n_b / n

    Args:
        moments: of the previous scores.
        scores: `[B]` float.

    Returns: The moments of all scores.

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

    With fixed moments of the reference's responses, this is the gain and bias of
    lm-human-preferences; with moments updated at every batch it is a running
    normalization. Both make β and the value clip independent of the scale of the reward
    model.

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
    """`[]` float32: σ = √(M / n), 0 if empty."""
    return jnp.sqrt(_variance(moments))


def _variance(moments: ScoreMoments) -> Array:
    return moments.squares / jnp.maximum(moments.count, 1.0)


EnsembleScore = Literal["mean", "worst", "mean-minus-std"]


def combine_scores(
    scores: Array, *, how: EnsembleScore = "mean", penalty: Scalar = 1.0
) -> Array:
    """Combines the scores of K reward models into one.

        mean              Σ_k s_k / K
        worst             min_k s_k
        mean-minus-std    mean − λ · √(Σ_k (s_k − mean)² / K)

    Models trained on the same judgements agree on the training distribution and differ
    outside of it, where a policy exploits their errors. The mean averages errors out;
    the other two also penalize disagreement. None of them detects errors shared by all
    models.

    Preferences determine scores only up to a constant, so the models need a common
    zero: train them with `center_coef`, or subtract each one's mean on the same
    responses.

    Args:
        scores: `[K, B]` float, one row per reward model.
        how: mean, worst or mean-minus-std.
        penalty: λ of mean-minus-std; unused by the others.

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


def soft_overlong_penalty(lengths: Array, *, limit: int, buffer: int) -> Array:
    """DAPO's soft overlong punishment, to be added to the scores.

        0                                where length ≤ limit − buffer
        (limit − buffer − length)/buffer in between, from 0 to −1
        −1                               where length > limit

    A hard penalty for truncation also hits correct reasoning that is slightly too long;
    this ramp increases gradually before the limit. Use it if responses run into the
    generation limit, with `limit` at most that limit: a larger one is never reached.
    The scale assumes scores of about ±1.

    Args:
        lengths: `[B]` integer, response tokens through the first stop token.
        limit: L_max, in tokens.
        buffer: L_cache, in tokens, the length of the ramp below `limit`.

    Returns:
        `[B]` float32, in [−1, 0].

    Raises:
        ValueError: when `buffer` is not in 1 … `limit`.
        AssertionError: on a wrong rank or dtype.

    References:
        Yu et al., 2025, arXiv:2503.14476, eq. 13 (there `limit` is 20,480 and `buffer`
        4,096).
    """
    chex.assert_rank(lengths, 1)
    chex.assert_type(lengths, int)
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer={buffer}: expected in 1 … limit={limit}")
    limit, buffer = int(limit), int(buffer)
    over = lengths.astype(jnp.float32) - (limit - buffer)
    return jnp.clip(-over / buffer, -1.0, 0.0)


def penalize_missing_eos(
    scores: Array,
    truncated: Array,
    *,
    penalty: Scalar,
    mode: MissingEOS = "subtract",
) -> Array:
    """Penalizes the scores of responses without EOS.

    * `"subtract"`: s − penalty (TRL); keeps the order of unfinished responses.
    * `"replace"`: the score *is* the penalty, such as −1 (lm-human-preferences): the
      reward model's score of an unfinished text is ignored. Idempotent.
    * `"scale"`: s · penalty, such as 0.5 or 0 (OpenRLHF); raises a negative score.

    Args:
        scores: `[B]` float.
        truncated: `[B]` bool, True where no stop token came before the limit.
        penalty: `[]`, positive to penalize by `"subtract"`, usually negative for
            `"replace"`, in [0, 1) for `"scale"`.
        mode: which of the three.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: on an unknown mode.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.
    """
    chex.assert_rank([scores, truncated], 1)
    chex.assert_equal_shape([scores, truncated])
    chex.assert_type([scores, truncated], [float, bool])
    scores = scores.astype(jnp.float32)
    penalty = jnp.asarray(penalty, jnp.float32)
    chex.assert_rank(penalty, 0)
    if mode == "subtract":
        return jnp.where(truncated, scores - penalty, scores)
    if mode == "replace":
        return jnp.where(truncated, penalty, scores)
    if mode == "scale":
        return jnp.where(truncated, penalty * scores, scores)
    raise ValueError(f"mode={mode!r}: expected 'subtract', 'replace' or 'scale'")
