"""The losses of actor and critic, reduced over the tokens of an experience."""

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo import diagnostics
from rlhf_jax.algo.diagnostics import PolicyLossFn
from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.masking import Aggregation, aggregate
from rlhf_jax.algo.policy_losses import clipped_policy_loss
from rlhf_jax.algo.types import Array, Experience, Scalar

KLFn = Callable[[Array, Array], Array]
"""`(logprobs, ref_logprobs) -> [B, T]` unreduced."""

_k2 = partial(kl_estimate, estimator="k2")


def clipped_value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    *,
    clip_eps: Scalar | None = 0.2,
    half: bool = True,
) -> Array:
    """Squared error of the critic, clipped around its old values, one term per token.

        V_c = V_old + clip(V − V_old, −ε, ε)
        L = ½ · max((V − R)², (V_c − R)²)

    The ½ is included, as in every implementation we know. A larger ε lets the critic
    move further per rollout (0.5 in verl and OpenRLHF, 0.2 in OpenAI-style PPO); it is
    in units of the score, so a critic that starts far off learns slowly. Padding is not
    handled here: if it may hold NaN or inf, mask the inputs as well as the result,
    because 0 · NaN in the backward pass is NaN (`critic_loss` does both).

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        old_values: `[B, T]` float, V(s_t) when the rollout was scored.
        returns: `[B, T]` float, R_t.
        clip_eps: ε; None gives the plain ½ · (V − R)².
        half: False omits the ½.

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
        # Not old + clip(new − old): that differs from `values` by rounding if
        # unclipped.
        clip_eps = jnp.asarray(clip_eps, jnp.float32)
        clipped = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
        loss = jnp.maximum(loss, jnp.square(clipped - returns))
    return 0.5 * loss if half else loss


def actor_loss(
    logprobs: Array,
    experience: Experience,
    *,
    entropy: Array | None = None,
    clip_eps: Scalar | None = None,
    clip_eps_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    log_ratio_clamp: float | None = None,
    policy_loss_fn: PolicyLossFn | None = None,
    kl_fn: KLFn = _k2,
    importance_weighted_kl: bool = False,
    entropy_coef: Scalar = 0.0,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
    length: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The actor loss in `ppo_loss`.

        w · policy_loss − entropy_coef · entropy + β · ρ_KL · kl_fn(π, π_ref)

    w is `experience.weights`, β is `experience.kl_coef`; without them w = 1 and there
    is no KL term (the KL is then in the rewards, or unused). ρ_KL is 1, or with
    `importance_weighted_kl` π / π_old without a gradient.

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training.
        experience: uses `mask`, `old_logprobs`, `advantages`, and if needed `weights`,
            `kl_coef` and `ref_logprobs`; padding may hold anything.
        entropy: `[B, T]` float, of π(· | s_t); None: no bonus and no metric.
        clip_eps: see `clipped_policy_loss`, like the next three; None: its 0.2.
        clip_eps_high: ε above 1.
        dual_clip: bound where A < 0.
        log_ratio_clamp: bound on log ρ, also as a weight of the KL.
        policy_loss_fn: replaces `clipped_policy_loss`; see
            `rlhf_jax.algo.policy_losses`.
        kl_fn: the KL term, unreduced; an estimator whose gradient is that of the KL.
        importance_weighted_kl: weight each token's KL by ρ, so that its gradient, given
            the states, is also that of π's KL after the first optimizer step.
        entropy_coef: weight of the entropy bonus.
        aggregation: see `aggregate`.
        num_tokens: see `ppo_loss`, like the next two.
        num_sequences: rows with a real token.
        length: of `"seq-mean-token-sum-norm"`.

    Returns:
        The `[]` float32 loss, with a gradient in `logprobs` and `entropy`, and the
        metrics `policy_loss`, `entropy`, `approx_kl`, `clip_fraction`, `ratio_mean`,
        as in `ppo_loss`, and `kl_loss` where there is a KL term. Under a
        `policy_loss_fn`, `clip_fraction` is the share of tokens with nonzero advantage
        but no gradient.

    Raises:
        ValueError: on an unknown aggregation, an `entropy_coef` without `entropy`, or
            PPO clip options with a `policy_loss_fn`.
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        ρ on the KL: DeepSeek-AI, 2025, arXiv:2512.02556, section 3.1.
    """
    mask = experience.mask
    logprobs, old_logprobs, advantages = _mask_inputs(
        mask, logprobs, experience.old_logprobs, experience.advantages
    )

    def reduce(terms: Array) -> Array:
        return aggregate(
            terms,
            mask,
            mode=aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            length=length,
        )

    loss_fn, clip_fraction_fn = _surrogate(
        policy_loss_fn, clip_eps, clip_eps_high, dual_clip, log_ratio_clamp
    )
    ratios = (logprobs, old_logprobs)
    terms = loss_fn(*ratios, advantages, mask)
    _check_shape(terms, mask)
    if experience.weights is not None:
        terms = jax.lax.stop_gradient(experience.weights.astype(jnp.float32)) * terms
    loss = policy_loss = reduce(terms)
    metrics = {
        "policy_loss": policy_loss,
        "approx_kl": diagnostics.approx_kl(*ratios, mask, num_tokens=num_tokens),
        "clip_fraction": clip_fraction_fn(
            *ratios, advantages, mask, num_tokens=num_tokens
        ),
        "ratio_mean": diagnostics.mean_ratio(*ratios, mask, num_tokens=num_tokens),
    }
    has_bonus = not isinstance(entropy_coef, numbers.Real) or entropy_coef != 0
    if entropy is not None:
        (entropy,) = _mask_inputs(mask, entropy)
        metrics["entropy"] = aggregate(entropy, mask, num_tokens=num_tokens)
        if has_bonus:
            loss = loss - jnp.asarray(entropy_coef, jnp.float32) * reduce(entropy)
    elif has_bonus:
        raise ValueError(f"entropy_coef={entropy_coef}: needs `entropy`")
    if experience.kl_coef is not None:
        terms = _kl_terms(logprobs, experience, kl_fn)
        if importance_weighted_kl:
            terms *= _kl_weights(*ratios, log_ratio_clamp)
        kl_loss = reduce(terms)
        loss, metrics = loss + kl_loss, metrics | {"kl_loss": kl_loss}
    return loss, jax.lax.stop_gradient(metrics)


def _kl_terms(logprobs: Array, experience: Experience, kl_fn: KLFn) -> Array:
    """`[B, T]`: β · kl_fn(π, π_ref)."""
    if experience.kl_coef is None or experience.ref_logprobs is None:
        raise ValueError("a KL term (experience.kl_coef) needs ref_logprobs")
    (ref_logprobs,) = _mask_inputs(experience.mask, experience.ref_logprobs)
    kl_coef = jax.lax.stop_gradient(experience.kl_coef.astype(jnp.float32))
    return kl_coef[:, None] * kl_fn(logprobs, jax.lax.stop_gradient(ref_logprobs))


def _kl_weights(logprobs: Array, old_logprobs: Array, clamp: float | None) -> Array:
    """`[B, T]`: ρ, without a gradient."""
    log_ratio = jax.lax.stop_gradient(logprobs - old_logprobs)
    return jnp.exp(log_ratio if clamp is None else jnp.clip(log_ratio, -clamp, clamp))


def _surrogate(
    policy_loss_fn: PolicyLossFn | None,
    clip_eps: Scalar | None,
    clip_eps_high: Scalar | None,
    dual_clip: Scalar | None,
    log_ratio_clamp: float | None,
) -> tuple[PolicyLossFn, Callable[..., Array]]:
    """The policy loss, and a function for its clip fraction."""
    if policy_loss_fn is None:
        clip: dict[str, Any] = {"clip_eps_high": clip_eps_high}
        if clip_eps is not None:
            clip["clip_eps"] = clip_eps
        bounds = {"dual_clip": dual_clip, "log_ratio_clamp": log_ratio_clamp}
        loss_fn = partial(clipped_policy_loss, **clip, **bounds)
        return loss_fn, partial(diagnostics.clip_fraction, **clip)
    for name, value in (
        ("clip_eps", clip_eps),
        ("clip_eps_high", clip_eps_high),
        ("dual_clip", dual_clip),
        ("log_ratio_clamp", log_ratio_clamp),
    ):
        if value is not None:
            raise ValueError(
                f"{name}={value}: has no effect with policy_loss_fn; pass it to that "
                "function with functools.partial"
            )
    return policy_loss_fn, partial(diagnostics.silenced_fraction, policy_loss_fn)


def critic_loss(
    values: Array,
    experience: Experience,
    *,
    value_clip_eps: Scalar | None = 0.2,
    half: bool = True,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
    length: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The critic loss in `ppo_loss`, without its coefficient.

    Args:
        values: `[B, T]` float, V(s_t) of the critic in training.
        experience: uses `value_mask` (or `mask` if None), `old_values` and `returns`;
            padding may hold anything.
        value_clip_eps: see `clipped_value_loss`.
        half: see `clipped_value_loss`.
        aggregation: see `aggregate`.
        num_tokens: `[]`, real tokens of the whole minibatch in the critic's mask.
        num_sequences: see `ppo_loss`.
        length: see `aggregate`.

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
            values, old_values, returns, clip_eps=value_clip_eps, half=half
        ),
        mask,
        mode=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        length=length,
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
    experience: Experience,
    *,
    entropy: Array | None = None,
    clip_eps: Scalar | None = None,
    clip_eps_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
    log_ratio_clamp: float | None = None,
    policy_loss_fn: PolicyLossFn | None = None,
    kl_fn: KLFn = _k2,
    importance_weighted_kl: bool = False,
    entropy_coef: Scalar = 0.0,
    value_clip_eps: Scalar | None = 0.2,
    value_coef: Scalar = 1.0,
    half: bool = True,
    aggregation: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_value_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
    length: Scalar | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one optimizer step of PPO.

        loss = actor_loss + value_coef · critic_loss

    Args:
        logprobs: `[B, T]` float, log π(a_t | s_t) of the policy in training, at the
            temperature of the sampler.
        values: `[B, T]` float, V(s_t) of the critic in training.
        experience: used as in `actor_loss` and `critic_loss`.
        entropy: see `actor_loss`, as for the eight arguments from `clip_eps` to
            `entropy_coef`.
        value_clip_eps: ε of `clipped_value_loss`; None for no clipping.
        value_coef: weight of the value loss; 0.1 in OpenAI-style PPO, where actor and
            critic share a trunk.
        half: see `clipped_value_loss`.
        aggregation: how terms are reduced; see `aggregate`.
        num_tokens: `[]`, real tokens of the whole minibatch, the divisor of
            `"token-mean"` and of the metrics; those of `experience.mask` by default.
        num_value_tokens: `[]`, the same for the critic, if its mask differs
            (`experience.value_mask`); `num_tokens` by default.
        num_sequences: `[]`, rows with a real token of the whole minibatch, the divisor
            of the `"seq-mean"` aggregations; those of `experience.mask` by default.
        length: the divisor of `"seq-mean-token-sum-norm"`; T by default.

    Returns:
        The `[]` float32 loss and the metrics of both losses, `[]` float32 without
        gradients: losses after reduction, the others as token means.

    Raises:
        ValueError: as `actor_loss` and `critic_loss`, or on a `dual_clip` of at most 1.
        AssertionError: on unequal shapes or a wrong dtype.

    References:
        Schulman et al., 2017, arXiv:1707.06347, eq. 9.
    """
    for_actor, actor_metrics = actor_loss(
        logprobs,
        experience,
        entropy=entropy,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        policy_loss_fn=policy_loss_fn,
        kl_fn=kl_fn,
        importance_weighted_kl=importance_weighted_kl,
        entropy_coef=entropy_coef,
        aggregation=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        length=length,
    )
    for_critic, critic_metrics = critic_loss(
        values,
        experience,
        value_clip_eps=value_clip_eps,
        half=half,
        aggregation=aggregation,
        num_tokens=num_tokens if num_value_tokens is None else num_value_tokens,
        num_sequences=num_sequences,
        length=length,
    )
    loss = for_actor + jnp.asarray(value_coef, jnp.float32) * for_critic
    return loss, actor_metrics | critic_metrics


def _check_shape(terms: Array, mask: Array) -> None:
    if terms.shape != mask.shape:
        found = f"policy_loss_fn returned an array of shape {terms.shape}"
        raise ValueError(f"{found}; expected one term per token, {mask.shape}")


def _mask_inputs(mask: Array, *arrays: Array) -> list[Array]:
    """The arrays as float32, 0 where `mask` is False.

    Masking only the terms is not enough: the gradient of exp at an infinite padding
    entry is inf, and 0 · inf is NaN.
    """
    chex.assert_rank([mask, *arrays], 2)
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type([mask, *arrays], [bool] + [float] * len(arrays))
    return [jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays]
