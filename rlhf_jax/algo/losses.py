"""The losses of PPO: per token, and reduced over the tokens of an experience."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo import diagnostics
from rlhf_jax.algo.diagnostics import ClipEps, ratio_range
from rlhf_jax.algo.masking import Aggregation, aggregate
from rlhf_jax.algo.types import Array, Experience, Scalar


def clipped_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps: ClipEps = 0.2,
    dual_clip: Scalar | None = None,
) -> Array:
    """PPO's clipped surrogate, negated, one term per token.

        ρ = π(a) / π_old(a) = exp(logprobs − old_logprobs)
        L = max(−ρ·A, −clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    and with `dual_clip` c, where A < 0: L ← min(L, −c·A), so that one token whose
    ratio has run away cannot rule the batch.

    Padding is not treated here: where it may hold NaN or inf, mask the inputs as well
    as the result, for 0 · inf in the backward pass is NaN (`actor_loss` does both).

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), of the policy that sampled.
        advantages: `[B, T]` float, A_t.
        clip_eps: ε, or `(ε_low, ε_high)`.
        dual_clip: c, above 1; None leaves it out.

    Returns:
        `[B, T]` float32, unreduced, with a gradient in `logprobs` only; exactly 0
        where the clipped branch is the larger.

    Raises:
        ValueError: when a `dual_clip` given as a Python number is not above 1.
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        Schulman et al., 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al., 2019,
        arXiv:1912.09729, eq. 5; ε_high > ε_low: Yu et al., 2025, arXiv:2503.14476.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages])
    chex.assert_type([logprobs, old_logprobs, advantages], float)
    if isinstance(dual_clip, int | float) and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: expected above 1, or None")
    old_logprobs, advantages = jax.lax.stop_gradient(
        (old_logprobs.astype(jnp.float32), advantages.astype(jnp.float32))
    )
    ratio = jnp.exp(logprobs.astype(jnp.float32) - old_logprobs)
    clipped_ratio = jnp.clip(ratio, *ratio_range(clip_eps))
    loss = jnp.maximum(-ratio * advantages, -clipped_ratio * advantages)
    if dual_clip is not None:
        bounded = jnp.minimum(loss, -dual_clip * advantages)
        loss = jnp.where(advantages < 0, bounded, loss)
    return loss


def clipped_value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    *,
    clip_eps: Scalar | None = 0.2,
) -> Array:
    """Squared error of the critic, clipped around its old values, one term per token.

        V_c = V_old + clip(V − V_old, −ε, ε)
        L = ½ · max((V − R)², (V_c − R)²)

    The ½ is part of it. Padding is not treated here, as in `clipped_policy_loss`.

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        old_values: `[B, T]` float, V(s_t) when the rollout was scored.
        returns: `[B, T]` float, R_t.
        clip_eps: ε; None gives the plain ½ · (V − R)².

    Returns:
        `[B, T]` float32, unreduced, with a gradient in `values` only; exactly 0 where
        the clipped branch is the larger.

    Raises:
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        `train_policy.py` of openai/lm-human-preferences, with Ziegler et al., 2019,
        arXiv:1909.08593.
    """
    chex.assert_equal_shape([values, old_values, returns])
    chex.assert_type([values, old_values, returns], float)
    old_values, returns = jax.lax.stop_gradient(
        (old_values.astype(jnp.float32), returns.astype(jnp.float32))
    )
    values = values.astype(jnp.float32)
    loss = jnp.square(values - returns)
    if clip_eps is not None:
        clipped = old_values + jnp.clip(values - old_values, -clip_eps, clip_eps)
        loss = jnp.maximum(loss, jnp.square(clipped - returns))
    return 0.5 * loss


def actor_loss(
    logprobs: Array,
    entropy: Array,
    experience: Experience,
    *,
    clip_eps: ClipEps = 0.2,
    dual_clip: Scalar | None = None,
    entropy_coef: Scalar = 0.0,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The actor's part of `ppo_loss`: clipped policy loss − entropy_coef · entropy.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        entropy: `[B, T]` float, of π(· | s_t).
        experience: read for `mask`, `old_logprobs` and `advantages`; padding may hold
            anything.
        clip_eps: ε, or `(ε_low, ε_high)`.
        dual_clip: see `clipped_policy_loss`.
        entropy_coef: weight of the entropy bonus.
        aggregation: see `aggregate`.
        num_tokens: see `ppo_loss`.
        num_sequences: see `ppo_loss`.

    Returns:
        The `[]` float32 loss, with a gradient in `logprobs` and `entropy`, and the
        metrics `policy_loss`, `entropy`, `approx_kl`, `clip_fraction`, `ratio_mean`,
        as in `ppo_loss`.

    Raises:
        ValueError: on an unknown aggregation.
        AssertionError: on unequal shapes or a wrong dtype.
    """
    mask = experience.mask
    logprobs, entropy, old_logprobs, advantages = _mask_inputs(
        mask, logprobs, entropy, experience.old_logprobs, experience.advantages
    )

    def reduce(terms: Array) -> Array:
        return aggregate(
            terms,
            mask,
            mode=aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )

    policy_loss = reduce(
        clipped_policy_loss(
            logprobs, old_logprobs, advantages, clip_eps=clip_eps, dual_clip=dual_clip
        )
    )
    ratios = (logprobs, old_logprobs)
    metrics = {
        "policy_loss": policy_loss,
        "entropy": aggregate(entropy, mask, num_tokens=num_tokens),
        "approx_kl": diagnostics.approx_kl(*ratios, mask, num_tokens=num_tokens),
        "clip_fraction": diagnostics.clip_fraction(
            *ratios, advantages, mask, clip_eps=clip_eps, num_tokens=num_tokens
        ),
        "ratio_mean": diagnostics.mean_ratio(*ratios, mask, num_tokens=num_tokens),
    }
    loss = policy_loss - entropy_coef * reduce(entropy)
    return loss, jax.lax.stop_gradient(metrics)


def critic_loss(
    values: Array,
    experience: Experience,
    *,
    value_clip_eps: Scalar | None = 0.2,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The critic's part of `ppo_loss`, without its coefficient.

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        experience: read for `mask`, `old_values` and `returns`; padding may hold
            anything.
        value_clip_eps: see `clipped_value_loss`.
        aggregation: see `aggregate`.
        num_tokens: see `ppo_loss`.
        num_sequences: see `ppo_loss`.

    Returns:
        The `[]` float32 loss, with a gradient in `values`, and the metrics
        `value_loss` and `value_clip_fraction`, as in `ppo_loss`.

    Raises:
        ValueError: on an unknown aggregation.
        AssertionError: on unequal shapes or a wrong dtype.
    """
    mask = experience.mask
    values, old_values, returns = _mask_inputs(
        mask, values, experience.old_values, experience.returns
    )
    loss = aggregate(
        clipped_value_loss(values, old_values, returns, clip_eps=value_clip_eps),
        mask,
        mode=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )
    clipped = jnp.zeros_like(loss)
    if value_clip_eps is not None:
        clipped = diagnostics.value_clip_fraction(
            values,
            old_values,
            returns,
            mask,
            clip_eps=value_clip_eps,
            num_tokens=num_tokens,
        )
    metrics = {"value_loss": loss, "value_clip_fraction": clipped}
    return loss, jax.lax.stop_gradient(metrics)


def ppo_loss(
    logprobs: Array,
    values: Array,
    entropy: Array,
    experience: Experience,
    *,
    clip_eps: ClipEps = 0.2,
    value_clip_eps: Scalar | None = 0.2,
    value_coef: Scalar = 0.1,
    entropy_coef: Scalar = 0.0,
    dual_clip: Scalar | None = None,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """What one optimizer step of PPO minimises.

        loss = policy_loss − entropy_coef · entropy + value_coef · value_loss

    The gradient in `logprobs` and `entropy` is that of `actor_loss`, the one in
    `values` that of `critic_loss` times `value_coef`.

    A minibatch that is read in several microbatches hands its own `num_tokens` and
    `num_sequences` to each of them: then losses, gradients and metrics, summed over
    the microbatches, are those of the minibatch.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training, at the
            temperature of the sampler.
        values: `[B, T]` float, V(s_t) of the critic in training.
        entropy: `[B, T]` float, of π(· | s_t).
        experience: read for `mask`, `old_logprobs`, `advantages`, `old_values` and
            `returns`; padding may hold anything.
        clip_eps: ε, or `(ε_low, ε_high)`, of `clipped_policy_loss`.
        value_clip_eps: ε of `clipped_value_loss`; None for no clipping.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        dual_clip: see `clipped_policy_loss`.
        aggregation: how terms are reduced; see `aggregate`.
        num_tokens: `[]`, real tokens of the whole minibatch, the divisor of
            `"token-mean"` and of the metrics; those of `experience.mask` by default.
        num_sequences: `[]`, rows with a real token of the whole minibatch, the divisor
            of the `"seq-mean"` aggregations; those of `experience.mask` by default.

    Returns:
        The `[]` float32 loss and a dict of `[]` float32 metrics without gradients:
        `policy_loss` and `value_loss`, reduced as the loss is, and as means over
        tokens `entropy`, `approx_kl`, `clip_fraction`, `value_clip_fraction`,
        `ratio_mean`.

    Raises:
        ValueError: on an unknown aggregation or a `dual_clip` of at most 1.
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        Schulman et al., 2017, arXiv:1707.06347, eq. 9.
    """
    for_actor, actor_metrics = actor_loss(
        logprobs,
        entropy,
        experience,
        clip_eps=clip_eps,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        aggregation=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )
    for_critic, critic_metrics = critic_loss(
        values,
        experience,
        value_clip_eps=value_clip_eps,
        aggregation=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )
    return for_actor + value_coef * for_critic, actor_metrics | critic_metrics


def _mask_inputs(mask: Array, *arrays: Array) -> list[Array]:
    """The arrays as float32, 0 where `mask` is False.

    Masking the terms alone would not do: the gradient of exp at an infinite padding
    entry is inf, and 0 · inf is NaN.
    """
    chex.assert_rank([mask, *arrays], 2)
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type([mask, *arrays], [bool] + [float] * len(arrays))
    return [jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays]
