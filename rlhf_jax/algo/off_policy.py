"""Corrections for a sampler whose numbers are not those of the trainer."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.masking import masked_mean
from rlhf_jax.algo.types import Array


def sampler_weights(
    old_logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    bound: float = 2.0,
    lower_bound: float = 0.0,
    mode: Literal["truncate", "mask"] = "truncate",
    level: Literal["token", "sequence"] = "token",
) -> Array:
    """Importance weights of tokens drawn by π_sampler and trained on as from π_old.

        w = π_old(a) / π_sampler(a),  per token, or its geometric mean over the answer

    * `"truncate"`: w between the bounds (truncated importance sampling: TIS).
    * `"mask"`: w where it lies within the bounds, 0 elsewhere (IcePop; with
      `level="sequence"` whole answers are left out).

    Multiply the unreduced policy loss by it. Choose it where the sampler rounds
    otherwise than the trainer (bfloat16, another kernel, another engine) and the old
    log-probabilities are recomputed by the trainer; where they are the sampler's own,
    every weight is 1.

    Args:
        old_logprobs: `[B, T]` float, log π_old(a_t | s_t), recomputed.
        sampler_logprobs: `[B, T]` float, of what the tokens were drawn from.
        mask: `[B, T]` bool, True on response tokens.
        bound: largest weight, positive.
        lower_bound: smallest weight; 0 for none.
        mode: what happens beyond the bounds.
        level: one weight per token, or one per answer.

    Returns:
        `[B, T]` float32, 0 where `mask` is False, without a gradient.

    Raises:
        ValueError: on an unknown mode or level.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy
        RL training"; IcePop: Ling team, 2025, arXiv:2510.18855.
    """
    chex.assert_rank([old_logprobs, sampler_logprobs, mask], 2)
    chex.assert_equal_shape([old_logprobs, sampler_logprobs, mask])
    chex.assert_type([old_logprobs, sampler_logprobs, mask], [float, float, bool])
    log_ratio = old_logprobs.astype(jnp.float32) - sampler_logprobs.astype(jnp.float32)
    log_ratio = jnp.where(mask, log_ratio, 0.0)
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, mask, axis=1)[:, None]
    elif level != "token":
        raise ValueError(f"level={level!r}: expected 'token' or 'sequence'")
    ratio = jnp.exp(log_ratio)
    if mode == "truncate":
        weights = jnp.clip(ratio, lower_bound, bound)
    elif mode == "mask":
        weights = jnp.where((ratio >= lower_bound) & (ratio <= bound), ratio, 0.0)
    else:
        raise ValueError(f"mode={mode!r}: expected 'truncate' or 'mask'")
    return jax.lax.stop_gradient(jnp.where(mask, weights, 0.0))
