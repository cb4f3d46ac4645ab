"""Advantages without a critic, beyond the group baselines of `group_advantages`.

Those from one score per answer are `[B]`, one number for a whole answer, and reach its
tokens by `broadcast_over_tokens`; those from token rewards, or whitened over tokens,
are `[B, T]`. None of them carries a gradient.

`scores` and `groups` are as in `group_advantages`: `[B]` float, and a group size or
`[B]` ids. Baselines and whitening look at a whole rollout: call these before it is
split into minibatches.
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
    """One number per answer, at each of its tokens.

    Args:
        advantages: `[B]` float.
        mask: `[B, T]` bool, True on response tokens.

    Returns:
        `[B, T]` float32, 0 where `mask` is False, whatever the row's number; without
        a gradient.

    Raises:
        AssertionError: on a wrong rank, unequal sizes or a wrong dtype.
    """
    chex.assert_rank([advantages, mask], [1, 2])
    chex.assert_equal_shape_prefix([advantages, mask], 1)
    chex.assert_type([advantages, mask], [float, bool])
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    return jnp.where(mask, advantages[:, None], 0.0)


def rewards_to_go(rewards: Array, mask: Array, *, gamma: Scalar = 1.0) -> Array:
    """REINFORCE's advantages: what is still to come, G_t = r_t + γ · G_{t+1}.

    The policy gradient is exact and its variance large; at γ = 1, subtract a baseline
    that does not depend on the answer, such as ReMax's or that of the other answers.

    Args:
        rewards: `[B, T]` float, r_t, as from `shape_rewards`.
        mask: `[B, T]` bool, True on response tokens. A masked token inside a row is
            passed over, as in `gae`.
        gamma: `[]`, discount per token, in [0, 1].

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Williams, 1992, Machine Learning 8; Sutton and Barto, Reinforcement Learning,
        2nd ed., section 13.3.
    """
    # GAE at λ = 1 with a critic of zeros; one pass over time, where `n_step_returns`
    # takes n.
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_plus_plus_advantages(
    rewards: Array, mask: Array, *, gamma: Scalar = 1.0, ddof: int = 0
) -> Array:
    """REINFORCE++: rewards to go, whitened over all real tokens of the batch.

    Choose it where there is one answer per prompt, so that no group can be formed: the
    baseline is what the whole batch earned.

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
    """REINFORCE++-baseline: s − group mean at every token, whitened over all of them.

    The group sets the baseline, the batch the scale, so that groups of nearly equal
    scores are not blown up as in GRPO. The whitening centres once more, over tokens: an
    answer with s − mean = 0 then has a small advantage, unless lengths and scores are
    unrelated. The KL belongs into the loss (k2).

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
    """ReMax: s − the score of the greedy answer to the same prompt.

    Exact in expectation, for the baseline does not depend on the sampled answer. Choose
    it where one sample and one greedy decode per prompt are affordable and a group is
    not. With rewards per token, subtract the greedy score from `rewards_to_go` instead,
    by `broadcast_over_tokens`.

    Args:
        scores: `[B]` float, of the sampled answers.
        greedy_scores: `[B]` float, of the most likely tokens' answers.

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
    """What each answer adds to the best of its group: max of all − max of the others.

    The best answer gets r_max − r_second and all others 0, as do all of them where two
    share the first place. Summed over a group, and without `scale`, that is an unbiased
    gradient of E[max over k answers], k the group's size: choose it to train for pass@k
    or best-of-k, at the price of a signal from one answer in k.

    Args:
        scores: `[B]` float.
        groups: a group size, or `[B]` integer ids.
        scale: `"std"` divides by the group's σ + eps, the default of verl.
        ddof: σ² divides by n − ddof.
        eps: added to σ.

    Returns:
        `[B]` float32, never negative; 0 in a group of one, which verl refuses.

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
