"""Policy losses that preserve entropy by penalizing or dropping a few tokens.

They have the same interface and guarantees as `policy_losses`: float32, unreduced, 0
where `mask` is False, a gradient in `logprobs` only, padding ignored.

The entropy of a policy decreases with the covariance of advantage and log-probability,
most of which comes from a small share of the tokens. Each token contributes

    c_t = (A_t − mean A) · (log π_t − mean log π)        means over all real tokens

Tokens are selected over the given arrays. With several microbatches each selects on its
own, so gradients do not add up to those of the minibatch. Ranking sorts the whole
batch, which needs a mesh with auto axes or an unsharded batch.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algo.diagnostics import is_clipped
from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.masking import masked_mean
from rlhf_jax.algo.policy_losses import (
    clipped_surrogate,
    hold_overflow,
    mask_loss_inputs,
)
from rlhf_jax.algo.types import Array, Scalar


def clip_cov_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    key: Array,
    clip_eps: Scalar = 0.2,
    clip_eps_high: Scalar | None = None,
    fraction: float = 2e-4,
    cov_range: tuple[Scalar, Scalar] = (1.0, 5.0),
) -> Array:
    """Clip-Cov: PPO's clipped loss without a few tokens that reduce entropy most.

    Among the tokens with c in `cov_range` (see the module) that PPO does not clip, k =
    max(⌊fraction · real tokens⌋, 1) are sampled at random (all if there are fewer), and
    their term is 0. Use it if entropy collapses early and an entropy bonus is too
    coarse.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, of the policy that sampled.
        advantages: `[B, T]` float, A_t.
        mask: `[B, T]` bool, True on real tokens.
        key: a typed PRNG key, consumed. The sample depends on the shape: an extra pad
            column changes it.
        clip_eps: ε_low of PPO's clip.
        clip_eps_high: ε_high; None: the same as ε_low.
        fraction: share of the real tokens to drop, in (0, 1].
        cov_range: bounds of c, exclusive; the defaults are the authors'.

    Returns:
        `[B, T]` float32, 0 where `mask` is False and at dropped tokens.

    Raises:
        ValueError: when `fraction` is out of range.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Cui et al., 2025, arXiv:2505.22617, section 4.2, and the authors' code in
        PRIME-RL/Entropy-Mechanism-of-RL.
    """
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    ratio = jnp.exp(hold_overflow(logprobs - old_logprobs, advantages >= 0))
    eps = {"clip_eps": clip_eps, "clip_eps_high": clip_eps_high}
    clipped = is_clipped(ratio, advantages, **eps)
    covariance = _token_covariances(logprobs, advantages, mask)
    least, most = (jnp.asarray(bound, jnp.float32) for bound in cov_range)
    candidates = mask & ~clipped & (covariance > least) & (covariance < most)
    lots = jnp.where(candidates, jax.random.uniform(key, mask.shape, jnp.float32), -1.0)
    left_out = candidates & _largest(lots, _share(fraction, mask))
    return jnp.where(left_out, 0.0, clipped_surrogate(ratio, advantages, **eps))


def kl_cov_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    fraction: float = 2e-4,
    kl_coef: Scalar = 1.0,
) -> Array:
    """KL-Cov: −ρ·A, with a KL penalty on the tokens that reduce entropy most.

        L = −ρ·A + [token among the k of largest c]·kl_coef·|log π − log π_old|

    with c as in the module and k = max(⌊fraction · real tokens⌋, 1); ties are broken by
    row and column order. Nothing is clipped, so the ratio of other tokens is unbounded.
    Prefer it to `clip_cov_loss` to pull such tokens back: a dropped token still moves
    with the others.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        old_logprobs: `[B, T]` float, of the policy that sampled.
        advantages: `[B, T]` float, A_t.
        mask: `[B, T]` bool, True on real tokens.
        fraction: share of the real tokens to penalize, in (0, 1]; the authors' scripts
            use 2e-3 for a model of 7B parameters, 2e-4 for one of 32B.
        kl_coef: `[]`, weight of the penalty.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        ValueError: when `fraction` is out of range.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Cui et al., 2025, arXiv:2505.22617, section 4.2, and the authors' code in
        PRIME-RL/Entropy-Mechanism-of-RL.
    """
    logprobs, old_logprobs, advantages = mask_loss_inputs(
        logprobs, old_logprobs, advantages, mask
    )
    log_ratio = hold_overflow(logprobs - old_logprobs, advantages == 0)
    covariance = _token_covariances(logprobs, advantages, mask)
    covariance = jnp.where(mask, covariance, -jnp.inf)
    held_back = _largest(covariance, _share(fraction, mask))
    distance = kl_estimate(logprobs, old_logprobs, estimator="abs")
    penalty = jnp.where(held_back, jnp.asarray(kl_coef, jnp.float32) * distance, 0.0)
    return penalty - jnp.exp(log_ratio) * advantages


def _token_covariances(logprobs: Array, advantages: Array, mask: Array) -> Array:
    """`[B, T]`: each token's contribution to the covariance, for selection."""
    return (advantages - masked_mean(advantages, mask)) * (
        logprobs - masked_mean(logprobs, mask)
    )


def _share(fraction: float, mask: Array) -> Array:
    """`[]` int32: max(⌊fraction · real tokens⌋, 1), the product in float32."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: expected in (0, 1]")
    tokens = jnp.sum(mask.astype(jnp.float32))
    return jnp.maximum(
        jnp.floor(jnp.asarray(fraction, jnp.float32) * tokens).astype(jnp.int32), 1
    )


def _largest(x: Array, count: Array) -> Array:
    """`[B, T]` bool: exactly the `count` largest entries; ties in order."""
    order = jnp.argsort(x.reshape(-1), descending=True, stable=True)
    rank = jnp.argsort(order)
    return (rank < count).reshape(x.shape)
