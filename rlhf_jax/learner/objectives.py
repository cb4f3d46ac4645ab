"""The differentiated functions of the three stages.

Each returns an `Objective`: `(params, batch, divisor) -> (loss, metrics)`, with losses
and metrics that add up over microbatches; see `rlhf_jax.learner.gradients`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import PolicyLossFn, actor_loss, critic_loss
from rlhf_jax.algo.options import KLOptions, PolicyLossOptions, ValueLossOptions
from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.types import (
    Array,
    Demonstrations,
    Experience,
    Params,
    Preferences,
    Scalar,
)
from rlhf_jax.interfaces import ActorCriticFn, ScoreFn, TokenLogprobsFn, ValuesFn
from rlhf_jax.learner.counts import Counts, count_experience
from rlhf_jax.learner.gradients import Metrics, Objective
from rlhf_jax.learner.train_state import ActorCritic


def separate_networks(
    *, token_logprobs_fn: TokenLogprobsFn, values_fn: ValuesFn
) -> ActorCriticFn:
    """Actor and critic that share nothing: neither loss reaches the other's parameters.

    Args:
        token_logprobs_fn: of the actor.
        values_fn: of the critic.
    """

    def forward(
        params: ActorCritic,
        tokens: Array,
        mask: Array,
        /,
        *,
        response_length: int,
        temperature: Scalar,
    ) -> tuple[Array, Array, Array]:
        logprobs, entropy = token_logprobs_fn(
            params.actor,
            tokens,
            mask,
            response_length=response_length,
            temperature=temperature,
        )
        values = values_fn(params.critic, tokens, mask, response_length=response_length)
        return logprobs, entropy, values

    return forward


def ppo_objective(
    forward: ActorCriticFn,
    *,
    temperature: Scalar = 1.0,
    policy_loss: PolicyLossOptions = PolicyLossOptions(),
    value_loss: ValueLossOptions = ValueLossOptions(),
    kl: KLOptions = KLOptions(),
    policy_loss_fn: PolicyLossFn | None = None,
    num_microbatches: int = 1,
) -> Objective:
    """PPO's clipped policy and value losses, with or without a KL term.

        loss = actor_loss + value_loss.coef · critic_loss

    The divisor is the minibatch's `Counts`.

    Args:
        forward: actor and critic, over `ActorCritic` parameters.
        temperature: the sampler's.
        policy_loss: options of the actor's loss; its aggregation is the critic's too.
        value_loss: options of the critic's loss.
        kl: which estimator the KL term takes, where the experience has one.
        policy_loss_fn: in place of PPO's clipped surrogate; see
            `rlhf_jax.algo.policy_losses`.
        num_microbatches: how many of them make a minibatch; read for
            `policy_loss.mean_of_means`, under which each divides by its own counts.
    """
    kl_fn = partial(
        kl_estimate,
        estimator=kl.estimator,
        straight_through=kl.straight_through,
        log_ratio_clamp=kl.log_ratio_clamp,
        clamp=kl.clamp,
    )
    clip_eps = policy_loss.clip_eps
    if policy_loss.clip_eps_high is not None:
        clip_eps = (policy_loss.clip_eps, policy_loss.clip_eps_high)

    def objective(
        params: ActorCritic, experience: Experience, counts: Counts
    ) -> tuple[Array, Metrics]:
        if (experience.kl_coef is None) != (kl.place != "loss"):
            raise ValueError(
                f"kl.place={kl.place!r}: give the objective the kl options that the "
                "experience was made with"
            )
        if (experience.weights is None) != (policy_loss.sampler_correction == "none"):
            raise ValueError(
                f"sampler_correction={policy_loss.sampler_correction!r}: give the "
                "objective the policy_loss options that the experience was made with"
            )
        if policy_loss.mean_of_means:
            own = count_experience(experience)
            counts = jax.tree.map(lambda n: n * num_microbatches, own)
        logprobs, entropy, values = forward(
            params,
            experience.tokens,
            experience.sequence_mask,
            response_length=experience.mask.shape[1],
            temperature=temperature,
        )
        for_actor, actor_metrics = actor_loss(
            logprobs,
            entropy,
            experience,
            clip_eps=clip_eps,
            dual_clip=policy_loss.dual_clip,
            log_ratio_clamp=policy_loss.log_ratio_clamp,
            policy_loss_fn=policy_loss_fn,
            kl_fn=kl_fn,
            entropy_coef=policy_loss.entropy_coef,
            aggregation=policy_loss.aggregation,
            num_tokens=counts.tokens,
            num_sequences=counts.sequences,
        )
        for_critic, critic_metrics = critic_loss(
            values,
            experience,
            value_clip_eps=value_loss.clip_eps,
            scale=0.5 if value_loss.half else 1.0,
            aggregation=policy_loss.aggregation,
            num_tokens=counts.value_tokens,
            num_sequences=counts.sequences,
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
        if "kl_loss" in actor_metrics:
            metrics["policy/kl_loss"] = actor_metrics["kl_loss"]
        return for_actor + value_loss.coef * for_critic, metrics

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
