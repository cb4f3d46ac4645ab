"""A scored rollout to experience: the PPO-RLHF recipe on arrays, in one screen."""

from typing import Literal

import jax.numpy as jnp

from rlhf_jax.algo.advantages import gae
from rlhf_jax.algo.diagnostics import explained_variance
from rlhf_jax.algo.masking import masked_mean, masked_whiten
from rlhf_jax.algo.rewards import penalize_missing_eos, shape_rewards
from rlhf_jax.algo.types import Array, Experience, Scalar, ScoredRollout


def make_experience(
    scored: ScoredRollout,
    *,
    kl_coef: Scalar,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    gamma: Scalar = 1.0,
    lam: Scalar = 0.95,
    missing_eos_penalty: Scalar | None = None,
    missing_eos_mode: Literal["subtract", "replace"] = "subtract",
    whiten_advantages: bool = True,
) -> tuple[Experience, dict[str, Array]]:
    """Shaped rewards, advantages and returns of one rollout.

    Order: missing-stop penalty on the scores, score at the last response token minus
    β·KL at every token, GAE, whitening over all response tokens of the batch. Returns
    are those of the raw advantages.

    Args:
        scored: the rollout with log-probabilities, values and scores.
        kl_coef: β.
        kl_estimator: of the per-token KL to the reference. Only `"k1"` optimises
            E[score] − β·KL; see `rlhf_jax.algo.rewards.shape_rewards`.
        gamma: discount per token.
        lam: λ of GAE.
        missing_eos_penalty: taken off (or put in place of) the score of an answer
            without a stop token; None leaves scores alone.
        missing_eos_mode: `"subtract"` or `"replace"`.
        whiten_advantages: centre and scale advantages to mean 0, variance 1.

    Returns:
        The experience and scalar float32 metrics over the whole batch. `kl/sequence`
        is the mean over sequences of Σ_t (log π − log π_ref), in nats, whatever the
        estimator that shapes the rewards.
    """
    rollout = scored.rollout
    mask = rollout.mask
    scores = scored.scores
    if missing_eos_penalty is not None:
        scores = penalize_missing_eos(
            scores,
            rollout.truncated,
            penalty=missing_eos_penalty,
            mode=missing_eos_mode,
        )
    rewards, _ = shape_rewards(
        scores,
        scored.logprobs,
        scored.ref_logprobs,
        mask,
        kl_coef=kl_coef,
        estimator=kl_estimator,
    )
    advantages, returns = gae(rewards, scored.values, mask, gamma=gamma, lam=lam)
    whitened = masked_whiten(advantages, mask) if whiten_advantages else advantages
    experience = Experience(
        tokens=rollout.tokens,
        sequence_mask=rollout.sequence_mask,
        mask=mask,
        old_logprobs=jnp.where(mask, scored.logprobs, 0.0),
        ref_logprobs=jnp.where(mask, scored.ref_logprobs, 0.0),
        old_values=jnp.where(mask, scored.values, 0.0),
        advantages=whitened,
        returns=returns,
    )
    log_ratio = experience.old_logprobs - experience.ref_logprobs
    metrics = {
        "reward/score_mean": jnp.mean(scored.scores),
        "reward/score_std": jnp.std(scored.scores),
        "reward/shaped_mean": jnp.mean(jnp.sum(rewards, axis=1)),
        "kl/sequence": jnp.mean(jnp.sum(log_ratio, axis=1)),
        "kl/token": masked_mean(log_ratio, mask),
        "kl/coef": jnp.asarray(kl_coef, jnp.float32),
        "value/explained_variance": explained_variance(
            experience.old_values, returns, mask
        ),
        "value/mean": masked_mean(experience.old_values, mask),
        "value/return_mean": masked_mean(returns, mask),
        "response/length_mean": jnp.mean(rollout.lengths.astype(jnp.float32)),
        "response/stop_rate": 1.0 - jnp.mean(rollout.truncated.astype(jnp.float32)),
    }
    return experience, metrics
