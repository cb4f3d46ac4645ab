"""The differentiated functions of the three stages.

Each returns an `Objective`: `(params, batch, divisor) -> (loss, metrics)`, with losses
and metrics that add up over microbatches; see `rlhf_jax.learner.gradients`.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.algo.diagnostics import ClipEps
from rlhf_jax.algo.losses import actor_loss, critic_loss
from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.types import (
    Array,
    Demonstrations,
    Experience,
    Params,
    Preferences,
    Scalar,
)
from rlhf_jax.interfaces import ScoreFn, TokenLogprobsFn, ValuesFn
from rlhf_jax.learner.gradients import Metrics, Objective
from rlhf_jax.learner.train_state import ActorCritic


def ppo_objective(
    *,
    token_logprobs_fn: TokenLogprobsFn,
    values_fn: ValuesFn,
    temperature: Scalar = 1.0,
    clip_eps: ClipEps = 0.2,
    value_clip_eps: Scalar | None = 0.2,
    entropy_coef: Scalar = 0.0,
    dual_clip: Scalar | None = None,
) -> Objective:
    """PPO's clipped policy and value losses; the divisor counts response tokens.

    Actor and critic are separate networks with optimizers of their own, so their
    losses are simply added: neither reaches the other's parameters.

    Args:
        token_logprobs_fn: of the actor.
        values_fn: of the critic.
        temperature: the sampler's.
        clip_eps: ε of the policy ratio, or `(ε_low, ε_high)`.
        value_clip_eps: ε of the value clip; None for no clipping.
        entropy_coef: weight of the entropy bonus.
        dual_clip: see `rlhf_jax.algo.losses.clipped_policy_loss`.
    """

    def objective(
        params: ActorCritic, experience: Experience, num_tokens: Array
    ) -> tuple[Array, Metrics]:
        tokens, mask = experience.tokens, experience.sequence_mask
        response_length = experience.mask.shape[1]
        logprobs, entropy = token_logprobs_fn(
            params.actor,
            tokens,
            mask,
            response_length=response_length,
            temperature=temperature,
        )
        values = values_fn(params.critic, tokens, mask, response_length=response_length)
        for_actor, actor_metrics = actor_loss(
            logprobs,
            entropy,
            experience,
            clip_eps=clip_eps,
            dual_clip=dual_clip,
            entropy_coef=entropy_coef,
            num_tokens=num_tokens,
        )
        for_critic, critic_metrics = critic_loss(
            values, experience, value_clip_eps=value_clip_eps, num_tokens=num_tokens
        )
        metrics = {
            "policy/loss": actor_metrics["policy_loss"],
            "policy/entropy": actor_metrics["entropy"],
            "policy/approx_kl": actor_metrics["approx_kl"],
            "policy/clip_fraction": actor_metrics["clip_fraction"],
            "policy/ratio_mean": actor_metrics["ratio_mean"],
            "value/loss": critic_metrics["value_loss"],
            "value/clip_fraction": critic_metrics["value_clip_fraction"],
        }
        return for_actor + for_critic, metrics

    return objective


def imitation_losses(
    token_logprobs_fn: TokenLogprobsFn,
) -> Callable[[Params, Demonstrations], Array]:
    """Negative log-likelihood of each sequence's target tokens, summed: `[B]`, nats."""

    def losses(params: Params, batch: Demonstrations) -> Array:
        logprobs, _ = token_logprobs_fn(
            params,
            batch.tokens,
            batch.mask,
            response_length=batch.tokens.shape[1] - 1,  # nothing predicts the first
            temperature=1.0,
        )
        return -jnp.sum(jnp.where(batch.target_mask[:, 1:], logprobs, 0.0), axis=1)

    return losses


def imitation_objective(token_logprobs_fn: TokenLogprobsFn) -> Objective:
    """Mean negative log-likelihood of target tokens; the divisor counts those."""
    losses = imitation_losses(token_logprobs_fn)

    def objective(
        params: Params, batch: Demonstrations, num_targets: Array
    ) -> tuple[Array, Metrics]:
        loss = jnp.sum(losses(params, batch)) / num_targets
        return loss, {"loss": loss}

    return objective


def preference_objective(
    score_fn: ScoreFn, *, label_smoothing: float = 0.0, center_coef: float = 0.0
) -> Objective:
    """Bradley–Terry loss of a reward model; the divisor counts pairs.

    Args:
        score_fn: of the reward model.
        label_smoothing: assumed probability that a judgement is flipped.
        center_coef: weight of ½(chosen + rejected)², which only pairs' differences
            leave free; keeps scores near 0.
    """

    def objective(
        params: Params, batch: Preferences, num_pairs: Array
    ) -> tuple[Array, Metrics]:
        # One pass over both halves: one large product instead of two small ones.
        tokens = jnp.concatenate([batch.chosen.tokens, batch.rejected.tokens])
        mask = jnp.concatenate([batch.chosen.mask, batch.rejected.mask])
        chosen, rejected = jnp.split(score_fn(params, tokens, mask), 2)
        losses = preference_loss(chosen, rejected, label_smoothing=label_smoothing)
        losses = losses + center_coef * 0.5 * (chosen + rejected) ** 2
        loss = jnp.sum(losses) / num_pairs
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum((chosen > rejected).astype(jnp.float32)) / num_pairs,
            "margin": jnp.sum(chosen - rejected) / num_pairs,
            "score_mean": 0.5 * jnp.sum(chosen + rejected) / num_pairs,
        }
        return loss, metrics

    return objective
