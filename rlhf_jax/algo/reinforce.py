"""Critic-free advantages other than `group_advantages`.

Those from sequence scores are `[B]`, one per response; `broadcast_over_tokens` expands
them. Those from token rewards, or whitened over tokens, are `[B, T]`. None of them
carries a gradient.

`scores` and `groups` are as in `group_advantages`: `[B]` float, and a group size or
`[B]` ids. Baselines and whitening use the full rollout: call these before splitting it
into minibatches.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.advantages import gae
from rlhf_jax.algo.group_advantages import (
    group_advantages,
    group_std,
    largest_of_others,
)
from rlhf_jax.algo.masking import masked_whiten
from rlhf_jax.algo.types import Array, Scalar


def broadcast_over_tokens(advantages: Array, mask: Array) -> Array:
    """Repeats one value per response over its tokens.

    Args:
        advantages: `[B]` float.
        mask: `[B, T]` bool, True on response tokens.

    Returns:
        `[B, T]` float32, 0 where `mask` is False; without a gradient.

    Raises:
        AssertionError: on a wrong rank, unequal sizes or a wrong dtype.
    """
    chex.assert_rank([advantages, mask], [1, 2])
    chex.assert_equal_shape_prefix([advantages, mask], 1)
    chex.assert_type([advantages, mask], [float, bool])
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    return jnp.where(mask, advantages[:, None], 0.0)


def rewards_to_go(rewards: Array, mask: Array, *, gamma: Scalar = 1.0) -> Array:
    """REINFORCE's advantages: rewards-to-go, G_t = r_t + γ · G_{t+1}.

    The policy gradient is exact but its variance is large; at γ = 1, subtract a
    baseline that does not depend on the response, such as ReMax's or leave-one-out.

    Args:
        rewards: `[B, T]` float, r_t, as from `shape_rewards`.
        mask: `[B, T]` bool, True on response tokens. A masked token inside a row is
            skipped, as in `gae`.
        gamma: `[]`, discount per token, in [0, 1].

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Williams, 1992, Machine Learning 8; Sutton and Barto, Reinforcement Learning,
        2nd ed., section 13.3.
    """
    # GAE at λ = 1 with zero values; one pass over time, while `n_step_returns` needs n.
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_plus_plus_advantages(
    rewards: Array, mask: Array, *, gamma: Scalar = 1.0, ddof: int = 0
) -> Array:
    """REINFORCE++: rewards-to-go, whitened over all real tokens of the batch.

    Use it with one response per prompt, when there are no groups: the baseline is the
    batch mean.

    Args:
        rewards: `[B, T]` float, r_t, with the KL penalty in them (`shape_rewards`).
        mask: `[B, T]` bool, True on response tokens.
        gamma: `[]`, discount per token, in [0, 1].
        ddof: of the variance; 0 in OpenRLHF, 1 in verl.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Hu et al., 2025, arXiv:2501.03262.
    """
    return masked_whiten(rewards_to_go(rewards, mask, gamma=gamma), mask, ddof=ddof)


def reinforce_plus_plus_baseline_advantages(
    scores: Array, groups: Array | int, mask: Array, *, ddof: int = 0
) -> Array:
    """REINFORCE++-baseline: s − group mean at every token, whitened over all tokens.

    The group gives the baseline and the batch the scale, so groups of nearly equal
    scores are not amplified as in GRPO. Whitening centers again, over tokens: a
    response with s − mean = 0 then has a small advantage, unless lengths and scores are
    uncorrelated. Put the KL in the loss (k2).

    Args:
        scores: `[B]` float.
        groups: a group size, or `[B]` integer ids.
        mask: `[B, T]` bool, True on response tokens.
        ddof: of the variance; 0 in OpenRLHF, 1 in verl.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        ValueError: when a group size does not divide B.
        AssertionError: on a wrong rank, unequal sizes or a wrong dtype.

    References:
        Hu et al., 2025, arXiv:2501.03262.
    """
    centred = group_advantages(scores, groups, scale="none", baseline="mean")
    return masked_whiten(broadcast_over_tokens(centred, mask), mask, ddof=ddof)


def remax_advantages(scores: Array, greedy_scores: Array) -> Array:
    """ReMax: s − the score of the greedy response to the same prompt.

    Unbiased, because the baseline does not depend on the sampled response. Use it if
    one sample and one greedy decode per prompt are affordable but a group is not. With
    token rewards, subtract the greedy score from `rewards_to_go` instead, with
    `broadcast_over_tokens`.

    Args:
        scores: `[B]` float, of the sampled responses.
        greedy_scores: `[B]` float, of the greedy responses.

    Returns:
        `[B]` float32.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Li et al., 2023, arXiv:2310.10505, algorithm 1.
    """
    chex.assert_rank([scores, greedy_scores], 1)
    chex.assert_equal_shape([scores, greedy_scores])
    chex.assert_type([scores, greedy_scores], float)
    advantages = scores.astype(jnp.float32) - greedy_scores.astype(jnp.float32)
    return jax.lax.stop_gradient(advantages)


def pass_at_k_advantages(
    scores: Array,
    groups: Array | int,
    *,
    scale: Literal["std", "none"] = "none",
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Array:
    """What each response adds to the best of its group: max of all − max of the others.

    The best response gets r_max − r_second and all others 0; if two tie for the best,
    all get 0. Summed over a group, without `scale`, this is an unbiased gradient of
    E[max over k responses], with k the group size: use it to train for pass@k or
    best-of-k, at the cost of a signal from only one response in k.

    Args:
        scores: `[B]` float.
        groups: a group size, or `[B]` integer ids.
        scale: `"std"` divides by the group's σ + eps, the default of verl.
        ddof: σ² divides by n − ddof.
        eps: added to σ.

    Returns:
        `[B]` float32, never negative; 0 in a group of one, which verl rejects.

    Raises:
        ValueError: when a group size does not divide B, or on an unknown scale.
        AssertionError: on a wrong rank or dtype.

    References:
        Tang et al., 2025, arXiv:2503.19595; `compute_grpo_passk_outcome_advantage` of
        verl.
    """
    chex.assert_rank(scores, 1)
    chex.assert_type(scores, float)
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r}: expected 'std' or 'none'")
    scores = scores.astype(jnp.float32)
    others = largest_of_others(scores, groups)
    gain = jnp.maximum(scores - others, 0.0)
    advantages = jnp.where(jnp.isneginf(others), 0.0, gain)
    if scale == "std":
        advantages = advantages / (
            group_std(scores, groups, ddof=ddof) + jnp.asarray(eps, jnp.float32)
        )
    return jax.lax.stop_gradient(advantages)
