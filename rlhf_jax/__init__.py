"""Reinforcement learning from human feedback with PPO, as pure JAX functions.

The exported functions take and return arrays; shapes and conventions are in
`rlhf_jax.algo.types`. Importing loads only jax and chex.
"""

from rlhf_jax.algo.advantages import gae, length_adaptive_lam, n_step_returns, td_errors
from rlhf_jax.algo.best_of_n import best_of_n_kl, best_of_n_mean, pass_at_k
from rlhf_jax.algo.covariance_losses import clip_cov_loss, kl_cov_loss
from rlhf_jax.algo.diagnostics import (
    approx_kl,
    clip_fraction,
    explained_variance,
    mean_ratio,
    value_clip_fraction,
)
from rlhf_jax.algo.group_advantages import (
    gpg_advantages,
    group_advantages,
    opo_advantages,
)
from rlhf_jax.algo.kl import adapt_kl_coef, kl_estimate
from rlhf_jax.algo.logprobs import (
    before_response,
    fused_token_logprobs,
    soft_cap,
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
from rlhf_jax.algo.off_policy import sampler_ratio, sampler_weights
from rlhf_jax.algo.options import (
    AdvantageOptions,
    GroupOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
    ValueLossOptions,
)
from rlhf_jax.algo.policy_losses import (
    cispo_loss,
    gmpo_loss,
    gspo_loss,
    reinforce_loss,
    sapo_loss,
)
from rlhf_jax.algo.preferences import (
    pairwise_ranking_loss,
    plackett_luce_loss,
    preference_loss,
)
from rlhf_jax.algo.reinforce import (
    broadcast_over_tokens,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rewards_to_go,
)
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.sampling import sample_token, transform_logits
from rlhf_jax.algo.scores import (
    ScoreMoments,
    combine_scores,
    init_score_moments,
    normalize_scores,
    penalize_missing_eos,
    soft_overlong_penalty,
    update_score_moments,
)
from rlhf_jax.algo.types import (
    Demonstrations,
    Experience,
    Preferences,
    Prompts,
    Rankings,
    Rollout,
    ScoredRollout,
    Sequences,
)

__version__ = "0.1.0"

__all__ = [
    "AdvantageOptions",
    "Demonstrations",
    "Experience",
    "GroupOptions",
    "KLOptions",
    "PolicyLossOptions",
    "Preferences",
    "Prompts",
    "Rankings",
    "Rollout",
    "ScoreMoments",
    "ScoreOptions",
    "ScoredRollout",
    "Sequences",
    "ValueLossOptions",
    "actor_loss",
    "adapt_kl_coef",
    "aggregate",
    "approx_kl",
    "before_response",
    "best_of_n_kl",
    "best_of_n_mean",
    "broadcast_over_tokens",
    "cispo_loss",
    "clip_cov_loss",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "combine_scores",
    "critic_loss",
    "explained_variance",
    "fused_token_logprobs",
    "gae",
    "gmpo_loss",
    "gpg_advantages",
    "group_advantages",
    "gspo_loss",
    "include_end_state",
    "init_score_moments",
    "kl_cov_loss",
    "kl_estimate",
    "last_token_index",
    "length_adaptive_lam",
    "masked_mean",
    "masked_whiten",
    "mean_ratio",
    "n_step_returns",
    "normalize_scores",
    "opo_advantages",
    "pairwise_ranking_loss",
    "pass_at_k",
    "pass_at_k_advantages",
    "penalize_missing_eos",
    "plackett_luce_loss",
    "ppo_loss",
    "preference_loss",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "response_mask",
    "rewards_to_go",
    "sample_token",
    "sampler_ratio",
    "sampler_weights",
    "sapo_loss",
    "shape_rewards",
    "soft_cap",
    "soft_overlong_penalty",
    "split_minibatches",
    "td_errors",
    "token_entropy",
    "token_logprobs",
    "transform_logits",
    "update_score_moments",
    "value_clip_fraction",
]
