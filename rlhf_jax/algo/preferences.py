"""Losses for reward models on human preferences."""

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
        chosen_scores: `[N]` float, of the preferred responses.
        rejected_scores: `[N]` float.
        margin: `[N]` float, target score difference; 0 by default.
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


def plackett_luce_loss(scores: Array, *, mask: Array) -> Array:
    """Plackett–Luce negative log-likelihood of each ranking.

    The best response is drawn first with probability softmax(s), the next from the
    remaining ones, and so on. With the K real responses of a row in ranking order:

        L = −Σ_k [s_k − log Σ_{j ≥ k} exp(s_j)]

    The last term is 0; for two responses L is `preference_loss`.

    Args:
        scores: `[N, K]` float, in each row from the best response to the worst. The
            order is strict: no ties.
        mask: `[N, K]` bool, True on real responses, in any pattern; the others may hold
            anything.

    Returns:
        `[N]` float32, unreduced, differentiable in the scores; 0 for a row with fewer
        than two responses.

    Raises:
        AssertionError: on a wrong rank, unequal shapes, or a wrong dtype.

    References:
        Plackett, 1975, "The Analysis of Permutations"; Luce, 1959, "Individual Choice
        Behavior". As the loss of a ranking function: ListMLE, Xia et al., 2008.
    """
    chex.assert_rank([scores, mask], 2)
    chex.assert_equal_shape([scores, mask])
    chex.assert_type([scores, mask], [float, bool])
    # Not −inf, which would give −inf − (−inf) in padding: `where` drops that NaN, but
    # jax.debug_nans would raise.
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask, scores.astype(jnp.float32), lowest)
    left = jax.lax.cumlogsumexp(scores, axis=1, reverse=True)  # over columns k … K
    return jnp.sum(jnp.where(mask, left - scores, 0.0), axis=1)


def pairwise_ranking_loss(
    scores: Array,
    grades: Array,
    *,
    mask: Array,
    margin_step: Scalar = 0.0,
    label_smoothing: Scalar = 0.0,
) -> Array:
    """Mean of `preference_loss` over the pairs of responses to each prompt.

    A pair is two real responses with different grades. Every prompt has equal weight
    regardless of its number of responses, and each response is scored once: splitting K
    responses into K(K − 1)/2 pairs over batches overfits.

    Args:
        scores: `[N, K]` float, one row per prompt, in any order.
        grades: `[N, K]` float, higher is better; only compared within a row. For a
            ranking, the negated rank.
        mask: `[N, K]` bool, True on real responses, in any pattern; the others may hold
            anything, in `scores` and in `grades`.
        margin_step: target score difference per unit of grade.
        label_smoothing: the probability that a judgement is flipped, in [0, 0.5).

    Returns:
        `[N]` float32, unreduced, differentiable in the scores; 0 for a row without
        pairs.

    Raises:
        ValueError: when a `label_smoothing` given as a number is outside
            [0, 0.5).
        AssertionError: on a wrong rank, unequal shapes, or a wrong dtype.

    References:
        Ouyang et al., 2022, arXiv:2203.02155, eq. 1 and the text below it.
    """
    chex.assert_rank([scores, grades, mask], 2)
    chex.assert_equal_shape([scores, grades, mask])
    chex.assert_type([scores, grades, mask], [float, float, bool])
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    grades = jnp.where(mask, grades.astype(jnp.float32), 0.0)
    differences = grades[:, :, None] - grades[:, None, :]  # [N, K, K], row over column
    is_pair = mask[:, :, None] & mask[:, None, :] & (differences > 0.0)
    losses = preference_loss(
        jnp.broadcast_to(scores[:, :, None], is_pair.shape),
        jnp.broadcast_to(scores[:, None, :], is_pair.shape),
        margin=jnp.asarray(margin_step, jnp.float32) * differences,
        label_smoothing=label_smoothing,
    )
    num_pairs = jnp.sum(is_pair, axis=(1, 2), dtype=jnp.float32)
    total = jnp.sum(jnp.where(is_pair, losses, 0.0), axis=(1, 2))
    return total / jnp.maximum(num_pairs, 1.0)
