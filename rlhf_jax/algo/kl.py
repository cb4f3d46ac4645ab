"""The KL penalty: per-token KL estimates and the adaptive coefficient."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar

KLEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_estimate(
    logprobs: Array,
    ref_logprobs: Array,
    *,
    estimator: KLEstimator = "k1",
    straight_through: bool = False,
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
) -> Array:
    """Estimates of KL(π‖π_ref), one per sampled token.

    With ℓ = log π(a) − log π_ref(a) at a token a drawn from π:

        k1 = ℓ             E k1 = KL; either sign
        k2 = ½ℓ²           not KL, but E ∇k2 = ∇KL; never negative
        k3 = e^(−ℓ) − 1 + ℓ    E k3 = KL; never negative
        abs = |ℓ|          neither

    In the reward use k1: only the policy gradient of −k1 is exactly −∇KL. In the loss
    use k2, or `straight_through`: E ∇k1 = 0 and E ∇k3 = ∇KL(π_ref‖π). These hold per
    token, given its prefix: the sum of k2 over a response ignores that early tokens
    also determine which later states are visited, which k1 in the reward accounts for
    (docs/what-is-unbiased.md has numbers).

    For monitoring, k3 has the lowest variance near the reference but explodes for very
    negative ℓ (22,015 at ℓ = −10): a clamp keeps low-precision training finite. A
    clamped estimate is biased and hides divergence, so monitor the unclamped one.
    Padding is not handled here: mask the result, and the inputs if you differentiate.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t).
        ref_logprobs: `[B, T]` float, log π_ref(a_t | s_t).
        estimator: which of the four.
        straight_through: the value of `estimator` with the gradient of k2, for a loss
            with an accurate KL value and the correct gradient ("k3+" in verl).
        log_ratio_clamp: c clamps ℓ to [−c, c] first (20 in verl's k3).
        clamp: c clamps the estimate to [−c, c] (10 in verl's k3 and OpenRLHF).

    Returns:
        `[B, T]` float32, differentiable in both arguments; with a gradient of 0 where
        a clamp acts (with `straight_through`, where that of ℓ acts).

    Raises:
        ValueError: on an unknown estimator.
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        Schulman, 2020, http://joschu.net/blog/kl-approx.html.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    chex.assert_type([logprobs, ref_logprobs], float)
    log_ratio = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if log_ratio_clamp is not None:
        bound = jnp.asarray(log_ratio_clamp, jnp.float32)
        log_ratio = jnp.clip(log_ratio, -bound, bound)
    if estimator == "k1":
        estimate = log_ratio
    elif estimator == "k2":
        estimate = 0.5 * jnp.square(log_ratio)
    elif estimator == "k3":
        # exp(-ℓ) - 1 would cancel near 0. Where the estimate is clamped, e^(-ℓ) must
        # not overflow, or its gradient would be 0 · inf.
        exponent = -log_ratio if clamp is None else jnp.minimum(-log_ratio, 80.0)
        estimate = jnp.expm1(exponent) + log_ratio
    elif estimator == "abs":
        estimate = jnp.sign(log_ratio) * log_ratio  # jnp.abs has a gradient of 1 at 0
    else:
        raise ValueError(f"estimator={estimator!r}: expected 'k1', 'k2', 'k3' or 'abs'")
    if clamp is not None:
        bound = jnp.asarray(clamp, jnp.float32)
        estimate = jnp.clip(estimate, -bound, bound)
    if straight_through:
        k2 = 0.5 * jnp.square(log_ratio)
        estimate = jax.lax.stop_gradient(estimate - k2) + k2
    return estimate


def adapt_kl_coef(
    kl_coef: Scalar,
    observed_kl: Scalar,
    *,
    target_kl: Scalar,
    horizon: Scalar,
    num_episodes: Scalar,
) -> Array:
    """Adapts the KL coefficient to keep the KL at its target.

        e = clip(KL / target − 1, −0.2, 0.2)
        β' = β · max(1 + e · n / horizon, 0.1)

    The paper has a constant gain instead of n / horizon, which is used in its code. The
    bound 0.1 is in neither: without it β becomes negative if n > 5·horizon and KL is 0.
    It only applies if n exceeds 4.5·horizon.

    Args:
        kl_coef: `[]`, β, positive.
        observed_kl: `[]`, in the unit of `target_kl`: usually the mean over sequences
            of the KL summed over a sequence's tokens.
        target_kl: `[]`, positive.
        horizon: `[]`, episodes over which β adapts.
        num_episodes: `[]`, n, sequences seen since the last call.

    Returns:
        `[]` float32, positive whenever `kl_coef` is.

    References:
        Ziegler et al., 2019, arXiv:1909.08593, section 2.2, and `train_policy.py` of
        openai/lm-human-preferences.
    """
    kl_coef, observed_kl, target_kl, horizon, num_episodes = (
        jnp.asarray(x, jnp.float32)
        for x in (kl_coef, observed_kl, target_kl, horizon, num_episodes)
    )
    error = jnp.clip(observed_kl / target_kl - 1.0, -0.2, 0.2)
    return kl_coef * jnp.maximum(1.0 + error * num_episodes / horizon, 0.1)
