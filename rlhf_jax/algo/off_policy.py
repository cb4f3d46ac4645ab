"""Corrections for a sampler whose numbers are not those of the trainer."""

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
"""Smallest and largest weight by level, where none are given."""


def sampler_ratio(
    old_logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    level: SamplerLevel = "token",
) -> Array:
    """π_old / π_sampler of tokens drawn by π_sampler and trained on as from π_old.

    * `"token"`: of each token.
    * `"sequence"`: of the whole answer, the product over its tokens: the only one with
      which the gradient of answers is unbiased, and of a variance that grows with them.
    * `"geometric"`: the geometric mean over the answer's tokens: how far the sampler is
      off per token, to tell answers apart by, and no importance weight.

    Args:
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), recomputed.
        sampler_logprobs: `[B, T]` float, of what the tokens were drawn from.
        mask: `[B, T]` bool, True on response tokens.
        level: of a token, or of its answer.

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
    """Importance weights of tokens drawn by π_sampler and trained on as from π_old.

        w = π_old / π_sampler, of the token or of its answer: see `sampler_ratio`

    * `"truncate"`: w between the bounds (truncated importance sampling: TIS).
    * `"mask"`: w where it lies within the bounds, 0 elsewhere (IcePop; of sequences,
      masked importance sampling).

    Multiply the unreduced policy loss by it. Choose it where sampler and trainer
    differ numerically (bfloat16, another kernel, another engine) and the old
    log-probabilities are recomputed by the trainer; where they are the sampler's own,
    every weight is 1.

    Args:
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), recomputed.
        sampler_logprobs: `[B, T]` float, of what the tokens were drawn from.
        mask: `[B, T]` bool, True on response tokens.
        bound: largest weight, positive; None: 2 for tokens, 3 for sequences as in TRL,
            1.01 for geometric means, which move far less than a product.
        lower_bound: smallest weight; None: 0, or 0.99 for geometric means.
        mode: what happens beyond the bounds.
        level: one weight per token, or one per answer.

    Returns:
        `[B, T]` float32, 0 where `mask` is False, without a gradient.

    Raises:
        ValueError: on an unknown mode or level, or bounds that are not in order.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy
        RL training"; IcePop: Ling team, 2025, arXiv:2510.18855; geometric means to
        reject answers by: Liu et al., 2025, "When speed kills stability".
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
