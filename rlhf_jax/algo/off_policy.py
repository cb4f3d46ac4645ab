"""Corrections for sampler–trainer mismatch."""

import numbers
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.masking import masked_mean
from rlhf_jax.algo.types import Array, Scalar

SamplerLevel = Literal["token", "sequence", "geometric"]

SAMPLER_BOUNDS = {
    "token": (0.0, 2.0),
    "sequence": (0.0, 3.0),
    "geometric": (0.99, 1.01),
}
"""Default lower and upper bounds by level."""


def sampler_ratio(
    old_logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    level: SamplerLevel = "token",
) -> Array:
    """π_old / π_sampler, for tokens sampled from π_sampler and treated as from π_old.

    * `"token"`: per token.
    * `"sequence"`: per response, the product over its tokens: the only level with an
      unbiased gradient; its variance grows with length.
    * `"geometric"`: the geometric mean over the response's tokens: a per-token mismatch
      for filtering responses, not an importance weight.

    Args:
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), recomputed.
        sampler_logprobs: `[B, T]` float, of the sampling distribution.
        mask: `[B, T]` bool, True on response tokens.
        level: per token or per response.

    Returns:
        `[B, T]` float32, 1 where `mask` is False, without a gradient.

    Raises:
        ValueError: on an unknown level.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.
    """
    chex.assert_rank([old_logprobs, sampler_logprobs, mask], 2)
    chex.assert_equal_shape([old_logprobs, sampler_logprobs, mask])
    chex.assert_type([old_logprobs, sampler_logprobs, mask], [float, float, bool])
    log_ratio = old_logprobs.astype(jnp.float32) - sampler_logprobs.astype(jnp.float32)
    log_ratio = jnp.where(mask, log_ratio, 0.0)
    if level == "sequence":
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
    elif level == "geometric":
        log_ratio = masked_mean(log_ratio, mask, axis=1)[:, None]
    elif level != "token":
        raise ValueError(
            f"level={level!r}: expected 'token', 'sequence' or 'geometric'"
        )
    return jax.lax.stop_gradient(jnp.where(mask, jnp.exp(log_ratio), 1.0))


def sampler_weights(
    old_logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    bound: Scalar | None = None,
    lower_bound: Scalar | None = None,
    mode: Literal["truncate", "mask"] = "truncate",
    level: SamplerLevel = "token",
) -> Array:
    """Importance weights for tokens sampled from π_sampler and treated as from π_old.

        w = π_old / π_sampler, of the token or its response: see `sampler_ratio`

    * `"truncate"`: w clipped to the bounds (truncated importance sampling: TIS).
    * `"mask"`: w within the bounds, 0 elsewhere (IcePop; for sequences, masked
      importance sampling).

    Multiply the unreduced policy loss by it. Use it if sampler and trainer differ
    numerically (bfloat16, another kernel, another engine) and the trainer recomputes
    the old log-probabilities; if they are the sampler's own, every weight is 1.

    Args:
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), recomputed.
        sampler_logprobs: `[B, T]` float, of the sampling distribution.
        mask: `[B, T]` bool, True on response tokens.
        bound: largest weight, positive; None: 2 for tokens, 3 for sequences as in TRL,
            1.01 for geometric means, which vary much less than a product.
        lower_bound: smallest weight; None: 0, or 0.99 for geometric means.
        mode: how weights out of bounds are treated.
        level: one weight per token, or one per response.

    Returns:
        `[B, T]` float32, 0 where `mask` is False, without a gradient.

    Raises:
        ValueError: on an unknown mode or level, or bounds that are not in order.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy
        RL training"; IcePop: Ling team, 2025, arXiv:2510.18855; geometric means to
        reject responses: Liu et al., 2025, "When speed kills stability".
    """
    ratio = sampler_ratio(old_logprobs, sampler_logprobs, mask, level=level)
    lowest, largest = SAMPLER_BOUNDS[level]
    lower_bound = lowest if lower_bound is None else lower_bound
    bound = largest if bound is None else bound
    given = isinstance(bound, numbers.Real) and isinstance(lower_bound, numbers.Real)
    if given and not 0 <= lower_bound < bound:
        raise ValueError(
            f"lower_bound={lower_bound}: expected from 0 to below bound={bound}"
        )
    lower_bound = jnp.asarray(lower_bound, jnp.float32)
    bound = jnp.asarray(bound, jnp.float32)
    if mode == "truncate":
        weights = jnp.clip(ratio, lower_bound, bound)
    elif mode == "mask":
        weights = jnp.where((ratio >= lower_bound) & (ratio <= bound), ratio, 0.0)
    else:
        raise ValueError(f"mode={mode!r}: expected 'truncate' or 'mask'")
    return jnp.where(mask, weights, 0.0)
