"""Makes experience from a scored rollout, for GRPO and other critic-free methods."""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.algo.group_advantages import (
    gpg_advantages,
    group_advantages,
    group_std,
    opo_advantages,
)
from rlhf_jax.algo.masking import masked_whiten
from rlhf_jax.algo.options import (
    GroupOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
)
from rlhf_jax.algo.reinforce import (
    broadcast_over_tokens,
    pass_at_k_advantages,
    rewards_to_go,
)
from rlhf_jax.algo.types import Array, Experience, Rollout, Scalar, ScoredRollout
from rlhf_jax.rollout.experience import (
    actor_experience,
    final_scores,
    rollout_metrics,
    token_rewards,
    used_responses,
)
from rlhf_jax.rollout.sampler_mismatch import share_beyond_bounds

GroupAdvantageFn = Callable[[Array, Array, int], Array]
"""`(rewards [B, T], mask [B, T], group_size) -> [B, T]`: advantages of each token."""


def make_group_experience(
    scored: ScoredRollout,
    *,
    group_size: int,
    kl_coef: Scalar,
    kl: KLOptions = KLOptions(),
    scores: ScoreOptions = ScoreOptions(),
    groups: GroupOptions = GroupOptions(),
    policy_loss: PolicyLossOptions = PolicyLossOptions(),
    greedy: tuple[Rollout, Array] | None = None,
    advantage_fn: GroupAdvantageFn | None = None,
) -> tuple[Experience, dict[str, Array]]:
    """Experience with advantages relative to other responses or the greedy response.

    Order: scores (`final_scores`); score at the end minus β·KL at every token, where
    the KL is in the reward; advantages by `token_advantages`. A response masked from
    the loss (`scores.missing_eos="mask"`) still counts in its group.

    Args:
        scored: the rollout with log-probabilities and scores; values are not used. Rows
            g·G … g·G + G − 1 are the responses to one prompt.
        group_size: G.
        kl_coef: `[]`, β of this step; `kl.coef` is only the initial value.
        kl: the penalty. With `place="loss"` the experience carries β to the loss.
        scores: score options, applied before the comparison.
        groups: from scores to advantages.
        policy_loss: used for `sampler_correction`.
        greedy: for `groups.baseline="greedy"`: the greedy response to the prompt of
            each row, and its `[B]` score.
        advantage_fn: instead of `token_advantages` and all options in `groups`. It gets
            token rewards, the mask, and the group size; the rewards of a row sum to its
            return.

    Returns:
        The experience, without old values and returns, and scalar float32 metrics over
        the batch. `group/score_std` is the mean over groups of the standard deviation
        of raw scores in them, if responses are compared.

    Raises:
        ValueError: on contradictory options, a group size that does not divide B if
            responses are compared, or if only one of greedy responses and the greedy
            baseline is given.
    """
    scores.validate_without_critic("scores")
    for name, options in (
        ("kl", kl),
        ("groups", groups),
        ("policy_loss", policy_loss),
    ):
        options.validate(name)
    if (groups.baseline == "greedy") != (greedy is not None):
        raise ValueError(
            f"groups.baseline={groups.baseline!r}: give greedy responses with the "
            "baseline 'greedy', and only with it"
        )
    rollout = scored.rollout
    rewards = token_rewards(scored, kl_coef=kl_coef, kl=kl, scores=scores)
    trained = rollout.mask & used_responses(rollout, scores)[:, None]
    if advantage_fn is None:
        advantages = token_advantages(
            rewards,
            rollout.mask,
            group_size,
            groups,
            trained=trained,
            greedy_scores=None if greedy is None else final_scores(*greedy, scores),
        )
    elif groups != GroupOptions():
        raise ValueError(f"groups={groups}: has no effect with advantage_fn")
    else:
        advantages = advantage_fn(rewards, rollout.mask, group_size)
        if advantages.shape != rewards.shape:
            raise ValueError(
                f"advantage_fn returned an array of shape {advantages.shape}; expected "
                f"one number per token, {rewards.shape}: see broadcast_over_tokens"
            )
    experience = actor_experience(
        scored,
        advantages,
        trained,
        kl_coef=kl_coef,
        kl=kl,
        policy_loss=policy_loss,
    )
    metrics = rollout_metrics(scored, rewards, kl_coef=kl_coef, kl=kl)
    metrics |= share_beyond_bounds(scored, trained, policy_loss)
    if groups.compares:
        inside = group_std(scored.scores, group_size, ddof=0)
        metrics["group/score_std"] = jnp.mean(inside)
    return experience, metrics


def token_advantages(
    rewards: Array,
    mask: Array,
    group_size: int,
    options: GroupOptions,
    *,
    trained: Array | None = None,
    greedy_scores: Array | None = None,
) -> Array:
    """Token advantages from token rewards.

    If responses are compared to each other, the return of a response is the sum of its
    rewards, and every token gets the same advantage. With the baselines `"greedy"` and
    `"none"` a token gets its rewards-to-go, minus the baseline.

    Args:
        rewards: `[B, T]` float32, from `token_rewards`.
        mask: `[B, T]` bool, True on response tokens.
        group_size: G; rows g·G … g·G + G − 1 are the responses to one prompt.
        options: baseline and scale.
        trained: `[B, T]` bool, tokens of responses not masked from the loss, for the
            scale `"tokens"`; `mask` by default.
        greedy_scores: `[B]` float32, for the baseline `"greedy"`.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        ValueError: when a group size does not divide B.
    """
    if options.compares:
        worth = jnp.sum(jnp.where(mask, rewards, 0.0), axis=1)
        advantages = broadcast_over_tokens(
            _group_advantages(worth, mask, group_size, options), mask
        )
    else:
        advantages = rewards_to_go(rewards, mask, gamma=options.gamma)
    if greedy_scores is not None:
        advantages -= broadcast_over_tokens(greedy_scores, mask)
    if options.scale == "tokens":
        advantages = masked_whiten(
            advantages, mask if trained is None else trained, ddof=options.ddof
        )
    return advantages


def _group_advantages(
    worth: Array, mask: Array, group_size: int, options: GroupOptions
) -> Array:
    """`[B]`: each response relative to its group."""
    scale = "none" if options.scale in ("tokens", "signal") else options.scale
    match options.baseline:
        case "length-weighted":
            lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
            return opo_advantages(worth, lengths, group_size)
        case "best-of-others":
            in_group = "std" if scale == "std" else "none"
            return pass_at_k_advantages(
                worth, group_size, scale=in_group, ddof=options.ddof
            )
        case "mean" if options.scale == "signal":
            return gpg_advantages(worth, group_size)
        case "greedy" | "none":
            raise ValueError(f"groups.baseline={options.baseline!r} has no groups")
        case baseline:
            return group_advantages(
                worth, group_size, scale=scale, baseline=baseline, ddof=options.ddof
            )
