"""The losses of PPO: per token, and reduced over the tokens of an experience."""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo import diagnostics
from rlhf_jax.algo.diagnostics import ClipEps, PolicyLossFn
from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.masking import Aggregation, aggregate
from rlhf_jax.algo.policy_losses import clipped_surrogate
from rlhf_jax.algo.types import Array, Experience, Scalar

KLFn = Callable[[Array, Array], Array]
"""`(logprobs, ref_logprobs) -> [B, T]` unreduced."""

_k2 = partial(kl_estimate, estimator="k2")


def clipped_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps: ClipEps = 0.2,
    dual_clip: Scalar | None = None,
    log_ratio_clamp: float | None = None,
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
        dual_clip: c, above 1; None leaves it out. For stale data, where a bad token's
            ratio can be large; 3 in verl, where it is on by default.
        log_ratio_clamp: bounds log ρ to [−c, c] before the exponential (20 in verl and
            OpenRLHF), so that ρ cannot overflow; no gradient where it acts.

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
    log_ratio = logprobs.astype(jnp.float32) - old_logprobs
    if log_ratio_clamp is not None:
        log_ratio = jnp.clip(log_ratio, -log_ratio_clamp, log_ratio_clamp)
    loss = clipped_surrogate(jnp.exp(log_ratio), advantages, clip_eps)
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
    scale: Scalar = 0.5,
) -> Array:
    """Squared error of the critic, clipped around its old values, one term per token.

        V_c = V_old + clip(V − V_old, −ε, ε)
        L = ½ · max((V − R)², (V_c − R)²)

    The ½ is part of it, here and in every implementation we know. A larger ε lets the
    critic move further per rollout (0.5 in verl and OpenRLHF, 0.2 in the OpenAI line);
    it is in units of the score, so a critic that starts far off learns slowly.
    Padding is not treated here, as in `clipped_policy_loss`.

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        old_values: `[B, T]` float, V(s_t) when the rollout was scored.
        returns: `[B, T]` float, R_t.
        clip_eps: ε; None gives the plain ½ · (V − R)².
        scale: 1 leaves the ½ out.

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
        # Not old + clip(new − old): that is not `values` where it does not clip.
        clipped = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
        loss = jnp.maximum(loss, jnp.square(clipped - returns))
    return scale * loss


def actor_loss(
    logprobs: Array,
    entropy: Array,
    experience: Experience,
    *,
    clip_eps: ClipEps = 0.2,
    dual_clip: Scalar | None = None,
    log_ratio_clamp: float | None = None,
    policy_loss_fn: PolicyLossFn | None = None,
    kl_fn: KLFn = _k2,
    entropy_coef: Scalar = 0.0,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The actor's part of `ppo_loss`.

        w · policy_loss − entropy_coef · entropy + β · kl_fn(π, π_ref)

    w is `experience.weights`, β is `experience.kl_coef`; without them w = 1 and there
    is no KL term (the KL then sits in the rewards, or nowhere).

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        entropy: `[B, T]` float, of π(· | s_t).
        experience: read for `mask`, `old_logprobs`, `advantages`, and where they are
            used `weights`, `kl_coef` and `ref_logprobs`; padding may hold anything.
        clip_eps: ε, or `(ε_low, ε_high)`.
        dual_clip: see `clipped_policy_loss`.
        log_ratio_clamp: see `clipped_policy_loss`.
        policy_loss_fn: takes the place of `clipped_policy_loss` and its options; see
            `rlhf_jax.algo.policy_losses`.
        kl_fn: the KL term, unreduced; an estimator whose gradient is that of the KL.
        entropy_coef: weight of the entropy bonus.
        aggregation: see `aggregate`.
        num_tokens: see `ppo_loss`.
        num_sequences: see `ppo_loss`.

    Returns:
        The `[]` float32 loss, with a gradient in `logprobs` and `entropy`, and the
        metrics `policy_loss`, `entropy`, `approx_kl`, `clip_fraction`, `ratio_mean`,
        as in `ppo_loss`, and `kl_loss` where there is a KL term. Under a
        `policy_loss_fn`, `clip_fraction` is the share of tokens with an advantage that
        it gives no gradient.

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

    ratios = (logprobs, old_logprobs)
    if policy_loss_fn is None:
        terms = clipped_policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            clip_eps=clip_eps,
            dual_clip=dual_clip,
            log_ratio_clamp=log_ratio_clamp,
        )
        clip_fraction = diagnostics.clip_fraction(
            *ratios, advantages, mask, clip_eps=clip_eps, num_tokens=num_tokens
        )
    else:
        terms = policy_loss_fn(logprobs, old_logprobs, advantages, mask)
        clip_fraction = diagnostics.silenced_fraction(
            policy_loss_fn, *ratios, advantages, mask, num_tokens=num_tokens
        )
    if experience.weights is not None:
        terms = jax.lax.stop_gradient(experience.weights) * terms
    policy_loss = reduce(terms)
    metrics = {
        "policy_loss": policy_loss,
        "entropy": aggregate(entropy, mask, num_tokens=num_tokens),
        "approx_kl": diagnostics.approx_kl(*ratios, mask, num_tokens=num_tokens),
        "clip_fraction": clip_fraction,
        "ratio_mean": diagnostics.mean_ratio(*ratios, mask, num_tokens=num_tokens),
    }
    loss = policy_loss - entropy_coef * reduce(entropy)
    if experience.kl_coef is not None:
        if experience.ref_logprobs is None:
            raise ValueError("a KL term (experience.kl_coef) needs ref_logprobs")
        (ref_logprobs,) = _mask_inputs(mask, experience.ref_logprobs)
        kl = kl_fn(logprobs, jax.lax.stop_gradient(ref_logprobs))
        kl_coef = jax.lax.stop_gradient(experience.kl_coef)[:, None]
        kl_loss = reduce(kl_coef * kl)
        loss, metrics = loss + kl_loss, metrics | {"kl_loss": kl_loss}
    return loss, jax.lax.stop_gradient(metrics)


def critic_loss(
    values: Array,
    experience: Experience,
    *,
    value_clip_eps: Scalar | None = 0.2,
    scale: Scalar = 0.5,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The critic's part of `ppo_loss`, without its coefficient.

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        experience: read for `value_mask` (`mask` where that is None), `old_values` and
            `returns`; padding may hold anything.
        value_clip_eps: see `clipped_value_loss`.
        scale: see `clipped_value_loss`.
        aggregation: see `aggregate`.
        num_tokens: `[]`, real tokens of the whole minibatch in the critic's mask.
        num_sequences: see `ppo_loss`.

    Returns:
        The `[]` float32 loss, with a gradient in `values`, and the metrics
        `value_loss` and `value_clip_fraction`, as in `ppo_loss`.

    Raises:
        ValueError: on an unknown aggregation, or an experience without values.
        AssertionError: on unequal shapes or a wrong dtype.
    """
    if experience.old_values is None or experience.returns is None:
        raise ValueError(
            "the experience has no old_values and returns: it was made without a critic"
        )
    mask = experience.mask if experience.value_mask is None else experience.value_mask
    values, old_values, returns = _mask_inputs(
        mask, values, experience.old_values, experience.returns
    )
    loss = aggregate(
        clipped_value_loss(
            values, old_values, returns, clip_eps=value_clip_eps, scale=scale
        ),
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
    num_value_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """What one optimizer step of PPO minimises.

        loss = policy_loss − entropy_coef · entropy + value_coef · value_loss

    The gradient in `logprobs` and `entropy` is that of `actor_loss`, the one in
    `values` that of `critic_loss` times `value_coef`.

    A minibatch that is read in several microbatches hands its own `num_tokens`,
    `num_value_tokens` and `num_sequences` to each of them: then losses, gradients and
    metrics, summed over the microbatches, are those of the minibatch.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training, at the
            temperature of the sampler.
        values: `[B, T]` float, V(s_t) of the critic in training.
        entropy: `[B, T]` float, of π(· | s_t).
        experience: read for `mask`, `old_logprobs`, `advantages`, `old_values` and
            `returns`; padding may hold anything. See `actor_loss` for a KL term in the
            loss and weights of tokens.
        clip_eps: ε, or `(ε_low, ε_high)`, of `clipped_policy_loss`.
        value_clip_eps: ε of `clipped_value_loss`; None for no clipping.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        dual_clip: see `clipped_policy_loss`.
        aggregation: how terms are reduced; see `aggregate`.
        num_tokens: `[]`, real tokens of the whole minibatch, the divisor of
            `"token-mean"` and of the metrics; those of `experience.mask` by default.
        num_value_tokens: `[]`, the same for the critic, where its tokens are others
            (`experience.value_mask`); `num_tokens` by default.
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
        num_tokens=num_tokens if num_value_tokens is None else num_value_tokens,
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
