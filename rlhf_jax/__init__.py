"""Reinforcement learning from human feedback with PPO, as pure JAX functions.

What is exported here takes arrays and returns arrays; shapes and conventions are in
`rlhf_jax.algo.types`. Importing it loads jax and chex only.
"""

from rlhf_jax.algo.advantages import gae, n_step_returns, td_errors
from rlhf_jax.algo.diagnostics import (
    approx_kl,
    clip_fraction,
    explained_variance,
    mean_ratio,
    value_clip_fraction,
)
from rlhf_jax.algo.group_advantages import group_advantages
from rlhf_jax.algo.kl import adapt_kl_coef, kl_estimate
from rlhf_jax.algo.logprobs import (
    before_response,
    fused_token_logprobs,
    token_entropy,
    token_logprobs,
)
from rlhf_jax.algo.losses import (
    actor_loss,
    clipped_policy_loss,
    clipped_value_loss,
    critic_loss,
    ppo_loss,
)
from rlhf_jax.algo.masking import (
    aggregate,
    include_end_state,
    last_token_index,
    masked_mean,
    masked_whiten,
    response_mask,
)
from rlhf_jax.algo.minibatches import split_minibatches
from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.rewards import penalize_missing_eos, shape_rewards
from rlhf_jax.algo.sampling import sample_token, transform_logits
from rlhf_jax.algo.types import (
    Demonstrations,
    Experience,
    Preferences,
    Prompts,
    Rollout,
    ScoredRollout,
    Sequences,
)

__version__ = "0.1.0"

__all__ = [
    "Demonstrations",
    "Experience",
    "Preferences",
    "Prompts",
    "Rollout",
    "ScoredRollout",
    "Sequences",
    "actor_loss",
    "adapt_kl_coef",
    "aggregate",
    "approx_kl",
    "before_response",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "critic_loss",
    "explained_variance",
    "fused_token_logprobs",
    "gae",
    "group_advantages",
    "include_end_state",
    "kl_estimate",
    "last_token_index",
    "masked_mean",
    "masked_whiten",
    "mean_ratio",
    "n_step_returns",
    "penalize_missing_eos",
    "ppo_loss",
    "preference_loss",
    "response_mask",
    "sample_token",
    "shape_rewards",
    "split_minibatches",
    "td_errors",
    "token_entropy",
    "token_logprobs",
    "transform_logits",
    "value_clip_fraction",
]
