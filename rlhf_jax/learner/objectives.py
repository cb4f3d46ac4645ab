"""The differentiated functions of PPO, and of its relatives without a critic.

Each is an `Objective`: `(params, batch, divisor) -> (loss, metrics)`, with losses and
metrics that add up over microbatches; see `rlhf_jax.learner.gradients`.
"""

from collections.abc import Callable
from functools import partial

import jax

from rlhf_jax.algo.diagnostics import ClipEps, PolicyLossFn
from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import actor_loss, critic_loss
from rlhf_jax.algo.options import KLOptions, PolicyLossOptions, ValueLossOptions
from rlhf_jax.algo.policy_losses import (
    cispo_loss,
    gmpo_loss,
    gspo_loss,
    reinforce_loss,
    sapo_loss,
)
from rlhf_jax.algo.types import Array, Experience, Scalar
from rlhf_jax.interfaces import ActorCriticFn, TokenLogprobsFn, ValuesFn
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
        policy_loss_fn: in place of the surrogate that `policy_loss` names; see
            `rlhf_jax.algo.policy_losses`.
        num_microbatches: how many of them make a minibatch; read for
            `policy_loss.mean_of_means`, under which each divides by its own counts.
    """
    actor_term = _actor_term(policy_loss, kl, policy_loss_fn)

    def objective(
        params: ActorCritic, experience: Experience, counts: Counts
    ) -> tuple[Array, Metrics]:
        counts = _divisors(counts, experience, policy_loss, num_microbatches)
        logprobs, entropy, values = forward(
            params,
            experience.tokens,
            experience.sequence_mask,
            response_length=experience.mask.shape[1],
            temperature=temperature,
        )
        for_actor, metrics = actor_term(logprobs, entropy, experience, counts)
        for_critic, critic_metrics = critic_loss(
            values,
            experience,
            value_clip_eps=value_loss.clip_eps,
            scale=0.5 if value_loss.half else 1.0,
            aggregation=policy_loss.aggregation,
            num_tokens=counts.value_tokens,
            num_sequences=counts.sequences,
        )
        metrics |= {
            "value/loss": critic_metrics["value_loss"],
            "value/clip_fraction": critic_metrics["value_clip_fraction"],
        }
        return for_actor + value_loss.coef * for_critic, metrics

    return objective


def critic_free_objective(
    token_logprobs_fn: TokenLogprobsFn,
    *,
    temperature: Scalar = 1.0,
    policy_loss: PolicyLossOptions = PolicyLossOptions(),
    kl: KLOptions = KLOptions(),
    policy_loss_fn: PolicyLossFn | None = None,
    num_microbatches: int = 1,
) -> Objective:
    """The actor's loss alone: GRPO and its relatives.

    Over `ActorCritic` parameters whose critic is empty, so that states and updates are
    those of PPO. The divisor is the minibatch's `Counts`.

    Args:
        token_logprobs_fn: of the actor.
        temperature: the sampler's.
        policy_loss: options of the loss.
        kl: which estimator the KL term takes, where the experience has one.
        policy_loss_fn: as in `ppo_objective`.
        num_microbatches: as in `ppo_objective`.
    """
    actor_term = _actor_term(policy_loss, kl, policy_loss_fn)

    def objective(
        params: ActorCritic, experience: Experience, counts: Counts
    ) -> tuple[Array, Metrics]:
        counts = _divisors(counts, experience, policy_loss, num_microbatches)
        logprobs, entropy = token_logprobs_fn(
            params.actor,
            experience.tokens,
            experience.sequence_mask,
            response_length=experience.mask.shape[1],
            temperature=temperature,
        )
        return actor_term(logprobs, entropy, experience, counts)

    return objective


ActorTerm = Callable[[Array, Array, Experience, Counts], tuple[Array, Metrics]]


def _actor_term(
    policy_loss: PolicyLossOptions, kl: KLOptions, policy_loss_fn: PolicyLossFn | None
) -> ActorTerm:
    """`(logprobs, entropy, experience, counts) -> (loss, metrics)`."""
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
    if policy_loss_fn is None:
        policy_loss_fn = _surrogate(policy_loss, clip_eps)

    def actor_term(
        logprobs: Array, entropy: Array, experience: Experience, counts: Counts
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
        loss, metrics = actor_loss(
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
        named = {
            "policy/loss": metrics["policy_loss"],
            "policy/entropy": metrics["entropy"],
            "policy/approx_kl": metrics["approx_kl"],
            "policy/clip_fraction": metrics["clip_fraction"],
            "policy/ratio_mean": metrics["ratio_mean"],
        }
        if "kl_loss" in metrics:
            named["policy/kl_loss"] = metrics["kl_loss"]
        return loss, named

    return actor_term


def _surrogate(options: PolicyLossOptions, clip_eps: ClipEps) -> PolicyLossFn | None:
    """The loss that the options name; None: PPO's, which `actor_loss` has itself."""
    match options.surrogate:
        case "gspo":
            return partial(gspo_loss, clip_eps=clip_eps)
        case "gmpo":
            return partial(gmpo_loss, clip_eps=clip_eps)
        case "cispo":
            return partial(cispo_loss, ratio_bounds=(None, options.ratio_bound))
        case "sapo":
            return sapo_loss
        case "reinforce":
            return reinforce_loss
    return None


def _divisors(
    counts: Counts,
    experience: Experience,
    policy_loss: PolicyLossOptions,
    num_microbatches: int,
) -> Counts:
    """The minibatch's counts, or under `mean_of_means` those of this microbatch."""
    if not policy_loss.mean_of_means:
        return counts
    own = count_experience(experience)
    return jax.tree.map(lambda n: n * num_microbatches, own)
