"""Diagnostics of an update. Masked, float32, and without a gradient.

If a minibatch is split into microbatches, pass the minibatch's number of real tokens to
each of them as `num_tokens`: then the results add up to those of the minibatch.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.masking import aggregate, masked_mean
from rlhf_jax.algo.types import Array, Scalar

PolicyLossFn = Callable[[Array, Array, Array, Array], Array]
"""`(logprobs, old_logprobs, advantages, mask) -> [B, T]` unreduced."""


def ratio_range(
    clip_eps: Scalar, clip_eps_high: Scalar | None = None
) -> tuple[Array, Array]:
    """The range of ratios that PPO does not clip, (1 − ε_low, 1 + ε_high).

    Args:
        clip_eps: ε_low.
        clip_eps_high: ε_high; None: the same as ε_low.

    Returns:
        Both `[]` float32.
    """
    high = clip_eps if clip_eps_high is None else clip_eps_high
    lowest, highest = (
        jnp.asarray(x, jnp.float32) for x in (1.0 - clip_eps, 1.0 + high)
    )
    return lowest, highest


def is_clipped(
    ratio: Array,
    advantages: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> Array:
    """Whether PPO clips a token: ρ is out of range in the direction of A.

    Args:
        ratio: ρ, any shape, float.
        advantages: A, the same shape, float.
        clip_eps: ε_low.
        clip_eps_high: ε_high; None: the same as ε_low.

    Returns:
        bool of that shape.
    """
    lowest, highest = ratio_range(clip_eps, clip_eps_high)
    return ((ratio > highest) & (advantages > 0)) | (
        (ratio < lowest) & (advantages < 0)
    )


def approx_kl(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    num_tokens: Scalar | None = None,
) -> Array:
    """KL(π_old‖π), estimated on tokens drawn from π_old: the mean of (ρ − 1) − log ρ.

    Never negative, and 0 if and only if no real token's probability changed.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t).
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t).
        mask: `[B, T]` bool, True on real tokens.
        num_tokens: `[]`, the divisor; the real tokens of `mask` by default. Returns:
            `[]` float32. References: Schulman, 2020,
            http://joschu.net/blog/kl-approx.html, k3.
    """
    terms = kl_estimate(old_logprobs, logprobs, estimator="k3")
    return jax.lax.stop_gradient(aggregate(terms, mask, num_tokens=num_tokens))


def mean_ratio(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    num_tokens: Scalar | None = None,
) -> Array:
    """Mean of ρ = π / π_old; 1 at the first step over a rollout, near 1 after it.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t).
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t).
        mask: `[B, T]` bool, True on real tokens.
        num_tokens: `[]`, what to divide by; the real tokens of `mask` by default.

    Returns:
        `[]` float32.
    """
    ratio = jnp.exp(kl_estimate(logprobs, old_logprobs, estimator="k1"))
    return jax.lax.stop_gradient(aggregate(ratio, mask, num_tokens=num_tokens))


def clip_fraction(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar = 0.2,
    clip_eps_high: Scalar | None = None,
    num_tokens: Scalar | None = None,
) -> Array:
    """Share of tokens that PPO clips, which have no gradient.

    Those with ρ > 1 + ε_high and A > 0, or ρ < 1 − ε_low and A < 0; a ratio out of
    range in the opposite direction of A still has a gradient and is not counted.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t).
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t).
        advantages: `[B, T]` float, A.
        mask: `[B, T]` bool, True on real tokens.
        clip_eps: ε_low.
        clip_eps_high: ε_high; None: the same as ε_low.
        num_tokens: `[]`, what to divide by; the real tokens of `mask` by default.

    Returns:
        `[]` float32, in [0, 1].
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    log_ratio = kl_estimate(logprobs, old_logprobs, estimator="k1")
    clipped = is_clipped(
        jnp.exp(log_ratio),
        advantages,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
    )
    share = aggregate(clipped.astype(jnp.float32), mask, num_tokens=num_tokens)
    return jax.lax.stop_gradient(share)


def silenced_fraction(
    policy_loss_fn: PolicyLossFn,
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    num_tokens: Scalar | None = None,
) -> Array:
    """Share of tokens with nonzero advantage for which a loss has no gradient.

    A generic `clip_fraction`, for losses that do not clip by PPO's range.

    Args:
        policy_loss_fn: each term must depend only on its own log-probability.
        logprobs: `[B, T]` float, log π(a_t | s_t), 0 where `mask` is False.
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), likewise.
        advantages: `[B, T]` float, A, likewise.
        mask: `[B, T]` bool, True on real tokens.
        num_tokens: `[]`, what to divide by; the real tokens of `mask` by default.

    Returns:
        `[]` float32, in [0, 1].
    """

    def terms(logprobs: Array) -> Array:
        return policy_loss_fn(logprobs, old_logprobs, advantages, mask)

    _, pull_back = jax.vjp(terms, jax.lax.stop_gradient(logprobs))
    (slope,) = pull_back(jnp.ones_like(logprobs))
    silenced = (slope == 0.0) & (advantages != 0.0) & mask
    share = aggregate(silenced.astype(jnp.float32), mask, num_tokens=num_tokens)
    return jax.lax.stop_gradient(share)


def value_clip_fraction(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array,
    *,
    clip_eps: Scalar = 0.2,
    num_tokens: Scalar | None = None,
) -> Array:
    """Share of tokens whose value loss is clipped, and so has no gradient.

    Those whose value moved by more than `clip_eps`, and is closer to the return than
    the clipped value.

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        old_values: `[B, T]` float, V(s_t) when the rollout was scored.
        returns: `[B, T]` float, R_t.
        mask: `[B, T]` bool, True on real tokens.
        clip_eps: ε of the value clip.
        num_tokens: `[]`, what to divide by; the real tokens of `mask` by default.

    Returns:
        `[]` float32, in [0, 1].
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type([values, old_values, returns, mask], [float, float, float, bool])
    values, old_values, returns = (
        x.astype(jnp.float32) for x in (values, old_values, returns)
    )
    clip_eps = jnp.asarray(clip_eps, jnp.float32)
    # Same as in the loss: old + clip(new − old) would differ from `values` by rounding.
    nearest = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
    clipped = jnp.abs(nearest - returns) > jnp.abs(values - returns)
    share = aggregate(clipped.astype(jnp.float32), mask, num_tokens=num_tokens)
    return jax.lax.stop_gradient(share)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """Explained variance of the critic: 1 − Var(R − V) / Var(R).

    1 for a perfect critic, 0 for a constant, negative for one worse than a constant.
    Not a mean over tokens, so values of microbatches do not add up.

    Args:
        values: `[B, T]` float, V(s_t).
        returns: `[B, T]` float, R_t.
        mask: `[B, T]` bool, True on real tokens.

    Returns:
        `[]` float32; 0 if the returns are constant.

    Raises:
        AssertionError: on unequal shapes or a wrong dtype.
    """
    chex.assert_equal_shape([values, returns, mask])
    chex.assert_type([values, returns, mask], [float, float, bool])
    values, returns = values.astype(jnp.float32), returns.astype(jnp.float32)

    def variance(x: Array) -> Array:
        x = jnp.where(mask, x, 0.0)
        x = x - masked_mean(x, mask)
        x = x - masked_mean(x, mask)  # a constant leaves exactly 0
        return masked_mean(jnp.square(x), mask)

    total, unexplained = variance(returns), variance(returns - values)
    varies = total > 0
    share = 1.0 - unexplained / jnp.where(varies, total, 1.0)
    return jax.lax.stop_gradient(jnp.where(varies, share, 0.0))
