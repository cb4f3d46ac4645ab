"""From one score per sequence to one reward per token."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.kl import KLEstimator, kl_estimate
from rlhf_jax.algo.masking import column_indices, last_token_index
from rlhf_jax.algo.types import Array, Scalar

ScorePosition = Literal["last_token", "after_last_token"]
MissingEOS = Literal["subtract", "replace", "scale"]


def shape_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    *,
    kl_coef: Scalar,
    estimator: KLEstimator = "k1",
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
    score_position: ScorePosition = "last_token",
) -> tuple[Array, Array]:
    """Token rewards: the score at the end, minus β·KL to the reference at every token.

        r_t = s · [t = end] − β · kl_t

    `end` is the last real token. With `score_position="after_last_token"` it is the
    column after it (the last real token if the row is full), as in TRL and
    summarize_from_feedback_details. That column is then a separate state: run `gae`
    over `include_end_state(mask)`, with the critic's value there, or 0 for a terminal
    state. Both positions give the real tokens the same advantages only at λ = 1. A row
    without real tokens gets no score.

    Args:
        scores: `[B]` float, s, one per sequence.
        logprobs: `[B, T]` float, of the behavior policy, log π(a_t | s_t).
        ref_logprobs: `[B, T]` float, of the frozen reference.
        mask: `[B, T]` bool, True on response tokens through the first stop token.
        kl_coef: `[]`, or one per row, `[B]`: β; 0: only the score.
        estimator: see `kl_estimate`. Only `"k1"` has the policy gradient of the KL.
        log_ratio_clamp: see `kl_estimate`.
        clamp: see `kl_estimate`.
        score_position: `"last_token"` or `"after_last_token"`.

    Returns:
        `(rewards, kl)`, both `[B, T]` float32, neither with a gradient. `kl` is 0 where
        `mask` is False, and so is `rewards` except for the score.

    Raises:
        ValueError: on an unknown estimator or score position.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Ziegler et al., 2019, arXiv:1909.08593, eq. 2; Ouyang et al., 2022,
        arXiv:2203.02155, eq. 2.
    """
    chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_equal_shape_prefix([scores, mask], 1)
    chex.assert_type(
        [scores, logprobs, ref_logprobs, mask], [float, float, float, bool]
    )
    kl_coef = jnp.asarray(kl_coef, jnp.float32)
    chex.assert_rank(kl_coef, {0, 1})
    if kl_coef.ndim:  # one per row; broadcasting would make it one per token
        chex.assert_shape(kl_coef, scores.shape)
        kl_coef = kl_coef[:, None]
    kl = kl_estimate(
        logprobs,
        ref_logprobs,
        estimator=estimator,
        log_ratio_clamp=log_ratio_clamp,
        clamp=clamp,
    )
    kl = jnp.where(mask, kl, 0.0)

    end = last_token_index(mask)  # [B]
    if score_position == "after_last_token":
        end = jnp.minimum(end + 1, mask.shape[1] - 1)
    elif score_position != "last_token":
        raise ValueError(
            f"score_position={score_position!r}: "
            "expected 'last_token' or 'after_last_token'"
        )
    # A comparison, not `.at[arange(B), end].add(...)`: that scatter does not trace on
    # a mesh with explicit axes.
    at_end = column_indices(mask) == end[:, None]  # [B, T]
    at_end = at_end & jnp.any(mask, axis=1, keepdims=True)
    placed = jnp.where(at_end, scores.astype(jnp.float32)[:, None], 0.0)
    return jax.lax.stop_gradient((placed - kl_coef * kl, kl))
