"""Sampler–trainer numerical mismatch: how large it is, and weights that correct it."""

import jax.numpy as jnp

from rlhf_jax.algo.masking import masked_mean
from rlhf_jax.algo.off_policy import sampler_ratio, sampler_weights
from rlhf_jax.algo.options import PolicyLossOptions
from rlhf_jax.algo.types import Array, ScoredRollout


def sampler_gap(scored: ScoredRollout) -> dict[str, Array]:
    """Sampler–trainer mismatch of the log-probabilities.

    `sampler/log_ratio` is the mean over tokens of |log π_old − log π_sampler| in nats,
    `sampler/log_ratio_max` the largest. Both should be rounding errors: if not small,
    see `sampler_weights`.
    """
    mask = scored.rollout.mask
    gap = jnp.abs(jnp.where(mask, scored.logprobs - scored.rollout.logprobs, 0.0))
    return {
        "sampler/log_ratio": masked_mean(gap, mask),
        "sampler/log_ratio_max": jnp.max(gap),
    }


def share_beyond_bounds(
    scored: ScoredRollout, mask: Array, policy_loss: PolicyLossOptions
) -> dict[str, Array]:
    """The share of tokens whose weight the correction truncates or masks."""
    weights = mismatch_weights(scored, mask, policy_loss)
    if weights is None:
        return {}
    ratio = sampler_ratio(
        scored.logprobs,
        scored.rollout.logprobs,
        mask,
        level=policy_loss.sampler_level,
    )
    changed = (weights != ratio).astype(jnp.float32)
    return {"sampler/beyond_bounds": masked_mean(changed, mask)}


def mismatch_weights(
    scored: ScoredRollout, mask: Array, policy_loss: PolicyLossOptions
) -> Array | None:
    """`[B, T]` importance weights that correct the mismatch; None: no correction."""
    if policy_loss.sampler_correction == "none":
        return None
    return sampler_weights(
        scored.logprobs,
        scored.rollout.logprobs,
        mask,
        bound=policy_loss.sampler_bound,
        lower_bound=policy_loss.sampler_lower_bound,
        level=policy_loss.sampler_level,
        mode=policy_loss.sampler_correction,
    )
