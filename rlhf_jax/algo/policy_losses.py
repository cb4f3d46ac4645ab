"""Surrogate losses: one term per token, with a common interface.

    loss(logprobs, old_logprobs, advantages, mask, *, …) → [B, T]

Each is a negated objective. The terms are float32, unreduced and 0 where `mask` is
False, with a gradient in `logprobs` only: term t has one at token t and at no other.
Padding may hold anything. `aggregate` reduces them. When all ratios are 1, every loss
here has the plain policy gradient −A_t; they differ in how they limit the policy as it
moves away from the behavior policy.

Ratios are exp(log π − log π_old) without a clamp unless a loss has one. An overflowing
ratio makes a loss infinite only if the loss is unbounded there: gradients of clipped
tokens, or of tokens with zero advantage, are exactly 0 at any ratio.
"""

import numbers

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.diagnostics import ratio_range
from rlhf_jax.algo.masking import masked_mean
from rlhf_jax.algo.types import Array, Scalar


def reinforce_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array
) -> Array:
    """Plain policy gradient, −A·log π; also the loss of GPG.

    Correct for one update per rollout: it has no ratio, so it does not account for
    changes of the policy. For several updates per rollout use a loss with a ratio.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float; its shape is checked, its values are unused. It is
            an argument so that all losses have the same signature.
        advantages: `[B, T]` float, A_t.
        mask: `[B, T]` bool, True on real tokens.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Williams, 1992, Machine Learning 8; Chu et al., 2025, arXiv:2504.02546.
    """
    logprobs, _, advantages = mask_loss_inputs(logprobs, old_logprobs, advantages, mask)
    return -advantages * logprobs


def clipped_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar = 0.2,
    clip_eps_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    log_ratio_clamp: float | None = None,
) -> Array:
    """PPO's clipped surrogate, negated, one term per token.

        ρ = π(a) / π_old(a) = exp(logprobs − old_logprobs)
        L = max(−ρ·A, −clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    and with `dual_clip` c, where A < 0: L ← min(L, −c·A), so that a single token with a
    huge ratio cannot dominate the batch.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), of the behavior policy.
        advantages: `[B, T]` float, A_t.
        mask: `[B, T]` bool, True on real tokens.
        clip_eps: ε_low.
        clip_eps_high: ε_high; None: the same as ε_low.
        dual_clip: c, above 1; None: no dual clip. For stale data, where ratios with
            negative advantage can be large; 3 in verl, on by default.
        log_ratio_clamp: clamps log ρ to [−c, c] before the exponential (20 in verl and
            OpenRLHF), so that ρ cannot overflow; no gradient where it is active.

    Returns:
        `[B, T]` float32, 0 where `mask` is False; the gradient is exactly 0 where the
        clipped branch is the larger.

    Raises:
        ValueError: when a `dual_clip` given as a number is not above 1.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Schulman et al., 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al., 2019,
        arXiv:1912.09729, eq. 5; ε_high > ε_low: Yu et al., 2025, arXiv:2503.14476.
    """
    if isinstance(dual_clip, numbers.Real) and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: expected above 1, or None")
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    log_ratio = logprobs - old_logprobs
    if log_ratio_clamp is not None:
        bound = jnp.asarray(log_ratio_clamp, jnp.float32)
        log_ratio = jnp.clip(log_ratio, -bound, bound)
    if dual_clip is not None:
        log_ratio = hold_overflow(log_ratio, True)
    ratio = jnp.exp(hold_overflow(log_ratio, advantages >= 0))
    loss = clipped_surrogate(ratio, advantages, clip_eps, clip_eps_high)
    if dual_clip is not None:
        bounded = jnp.minimum(loss, -jnp.asarray(dual_clip, jnp.float32) * advantages)
        loss = jnp.where(advantages < 0, bounded, loss)
    return loss


def gspo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar = 3e-4,
    clip_eps_high: Scalar | None = 4e-4,
) -> Array:
    """GSPO: PPO's clip on one ratio per sequence, the geometric mean of its tokens'.

        s = exp(mean_t log(π / π_old))          s_t = sg(s) · π / sg(π)
        L = max(−s_t·A_t, −clip(s_t, 1 − ε_low, 1 + ε_high)·A_t)

    s_t equals s and has its gradient at token t, so that a sequence is clipped as a
    whole if its tokens share one advantage. With `"seq-mean-token-mean"`, the paper's
    reduction, this is the loss and gradient of s itself.

    Use it for long responses and mixtures of experts, where token ratios are noisy.
    Over a sequence the noise averages out, and ε is hundreds of times smaller than
    PPO's.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, of the policy that sampled.
        advantages: `[B, T]` float, A_t, usually one number per sequence.
        mask: `[B, T]` bool, True on real tokens.
        clip_eps: ε_low; this default and the next are the paper's.
        clip_eps_high: ε_high; None: the same as ε_low.

    Returns:
        `[B, T]` float32, 0 where `mask` is False; the gradient is exactly 0 where the
        clipped branch is the larger.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Zheng et al., 2025, arXiv:2507.18071, sections 4.1 and 4.3.
    """
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    log_ratio = masked_mean(logprobs - old_logprobs, mask, axis=1)[:, None]  # [B, 1]
    log_ratio = hold_overflow(jax.lax.stop_gradient(log_ratio), advantages >= 0)
    ratio = jnp.exp(log_ratio) * _one(logprobs)
    return clipped_surrogate(ratio, advantages, clip_eps, clip_eps_high)


def gmpo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar = 0.4,
    clip_eps_high: Scalar | None = None,
) -> Array:
    """GMPO: the geometric mean over a sequence of individually clipped ratios.

        l_t = min(log ρ_t, ε_high) where A_t > 0, else max(log ρ_t, −ε_low)
        s = exp(mean_t l_t)          s_t = sg(s) · exp(l_t) / sg(exp(l_t))
        L = −s_t·A_t

    The clip is on *logarithms* of ratios, so ε = 0.4 allows e^±0.4, and only in the
    direction of the advantage. With `"seq-mean-token-mean"` this is the paper's loss
    and gradient.

    Prefer it to `gspo_loss` if a few tokens should not clip their sequence: only
    clipped tokens lose their gradient.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, of the policy that sampled.
        advantages: `[B, T]` float, A_t; one number per sequence in the paper.
        mask: `[B, T]` bool, True on real tokens.
        clip_eps: ε_low, in nats; the default is the paper's.
        clip_eps_high: ε_high, in nats; None: the same as ε_low.

    Returns:
        `[B, T]` float32, 0 where `mask` is False; the gradient is exactly 0 where l_t
        is clipped.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Zhao et al., 2025, arXiv:2507.20673, and the authors' code, callsys/GMPO.
    """
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    high = clip_eps if clip_eps_high is None else clip_eps_high
    low, high = (jnp.asarray(x, jnp.float32) for x in (-clip_eps, high))
    log_ratio = logprobs - old_logprobs
    clipped = jnp.where(
        advantages > 0, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, low)
    )
    mean = jax.lax.stop_gradient(masked_mean(clipped, mask, axis=1))[:, None]  # [B, 1]
    mean = jnp.where(advantages == 0, 0.0, mean)  # because 0 · inf is NaN
    return -advantages * jnp.exp(mean) * _one(clipped)


def cispo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    bound: Scalar = 5.0,
    lower_bound: Scalar = 0.0,
) -> Array:
    """CISPO: policy gradient with clipped importance weights, −sg(clip(ρ))·A·log π.

    The bounds limit a token's weight but not its gradient direction: every token with
    an advantage has a gradient at every step. Use it if PPO's clip would remove rare
    but important reasoning tokens.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, of the policy that sampled.
        advantages: `[B, T]` float, A_t.
        mask: `[B, T]` bool, True on real tokens.
        bound: the largest weight (a value of ρ, not its distance from 1); TRL
            recommends 5, verl and slime use 1 + ε_high.
        lower_bound: the smallest weight; 0 leaves the low side unbounded, as in the
            paper.

    Returns:
        `[B, T]` float32, 0 where `mask` is False; finite for any finite input.

    Raises:
        ValueError: when bounds given as numbers are not in order.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        MiniMax, 2025, arXiv:2506.13585, section 3.1; the bound 5: Khatri et al., 2025,
        arXiv:2510.13786.
    """
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    given = isinstance(bound, numbers.Real) and isinstance(lower_bound, numbers.Real)
    if given and not lower_bound < bound:
        raise ValueError(f"lower_bound={lower_bound}: expected below bound={bound}")
    ratio = jnp.exp(logprobs - old_logprobs)
    bounds = (jnp.asarray(x, jnp.float32) for x in (lower_bound, bound))
    weight = jax.lax.stop_gradient(jnp.clip(ratio, *bounds))
    return -weight * advantages * logprobs


def sapo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    tau_positive: Scalar = 1.0,
    tau_negative: Scalar = 1.05,
) -> Array:
    """SAPO: a soft gate instead of the clip, −(4/τ)·sigmoid(τ·(ρ − 1))·A.

    Its gradient −4·σ·(1 − σ)·ρ·A decays smoothly as ρ moves away from 1, without a
    cutoff; a larger τ decays faster. Tokens with A > 0 use `tau_positive`, the others
    `tau_negative`. Use it if the share of clipped tokens jumps between steps.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, of the policy that sampled.
        advantages: `[B, T]` float, A_t.
        mask: `[B, T]` bool, True on real tokens.
        tau_positive: `[]`, τ where A > 0, positive; the defaults are the paper's.
        tau_negative: `[]`, τ elsewhere, positive.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        ValueError: when a τ given as a number is not positive.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Gao et al., 2025, arXiv:2511.20347.
    """
    for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if isinstance(tau, numbers.Real) and not tau > 0:
            raise ValueError(f"{name}={tau}: expected above 0")
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    taus = (jnp.asarray(x, jnp.float32) for x in (tau_positive, tau_negative))
    tau = jnp.where(advantages > 0, *taus)
    ratio = jnp.exp(hold_overflow(logprobs - old_logprobs, True))  # saturated
    gate = jax.nn.sigmoid(tau * (ratio - 1.0))
    return -4.0 / tau * gate * advantages


def mask_loss_inputs(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Common preprocessing of policy losses: checks, float32, 0 where `mask` is False.

    Args:
        logprobs: `[B, T]` float; may hold anything where `mask` is False, as may the
            next two.
        old_logprobs: `[B, T]` float.
        advantages: `[B, T]` float.
        mask: `[B, T]` bool, True on real tokens.

    Returns:
        The first three, `[B, T]` float32; the second and third without a gradient.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.
    """
    arrays = [logprobs, old_logprobs, advantages]
    chex.assert_rank([*arrays, mask], 2)
    chex.assert_equal_shape([*arrays, mask])
    chex.assert_type([*arrays, mask], [float, float, float, bool])
    # Masks the inputs, not the result: the gradient of `where` through a NaN is NaN.
    # Zero advantages then make the padding terms 0.
    logprobs, old_logprobs, advantages = (
        jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays
    )
    return logprobs, *jax.lax.stop_gradient((old_logprobs, advantages))


def _one(log_x: Array) -> Array:
    """x / sg(x): 1, with the gradient of log x."""
    return jnp.exp(log_x - jax.lax.stop_gradient(log_x))


def clipped_surrogate(
    ratio: Array,
    advantages: Array,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> Array:
    """PPO's max(−ρ·A, −clip(ρ, 1 − ε_low, 1 + ε_high)·A).

    Args:
        ratio: ρ, any shape, float32.
        advantages: A, the same shape.
        clip_eps: ε_low.
        clip_eps_high: ε_high; None: the same as ε_low.

    Returns:
        float32 of that shape; its gradient in `ratio` is exactly 0 where the clipped
        branch is the larger.
    """
    clipped_ratio = jnp.clip(ratio, *ratio_range(clip_eps, clip_eps_high))
    return jnp.maximum(-ratio * advantages, -clipped_ratio * advantages)


def hold_overflow(log_ratio: Array, where: Array | bool) -> Array:
    """Clamps log-ratios at 80 `where` the loss is constant beyond.

    e^89 is infinite in float32, and a gradient of 0 through it would be 0 · inf, NaN.

    Args:
        log_ratio: any shape, float32.
        where: bool, broadcast to that shape.

    Returns:
        float32 of that shape, without a gradient where it is clamped.
    """
    return jnp.where((log_ratio > 80.0) & where, 80.0, log_ratio)
