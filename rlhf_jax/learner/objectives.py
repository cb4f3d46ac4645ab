"""The objectives of PPO and of critic-free methods.

Each is an `Objective`: `(params, batch, divisor) -> (loss, metrics)`, with losses and
metrics that sum over microbatches; see `rlhf_jax.learner.gradients`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algo.diagnostics import PolicyLossFn
from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import actor_loss, critic_loss
from rlhf_jax.algo.options import (
    KLOptions,
    PolicyLossOptions,
    ValueLossOptions,
    check,
    require_defaults,
)
from rlhf_jax.algo.policy_losses import (
    cispo_loss,
    gmpo_loss,
    gspo_loss,
    reinforce_loss,
    sapo_loss,
)
from rlhf_jax.algo.types import Array, Experience, Scalar, record
from rlhf_jax.interfaces import ActorCriticFn, TokenLogprobsFn, ValuesFn
from rlhf_jax.learner.gradients import Metrics, Objective
from rlhf_jax.learner.train_state import ActorCritic


@record
class Counts:
    """Divisors of policy objectives; each at least 1."""

    tokens: Array  # [] float32, real tokens of the actor
    value_tokens: Array  # [] float32, of the critic
    sequences: Array  # [] float32, rows with a real token


def count_experience(experience: Experience) -> Counts:
    """The counts of a minibatch."""
    mask, value_mask = experience.mask, experience.value_mask

    def at_least_one(x: Array) -> Array:
        return jnp.maximum(jnp.sum(x), 1).astype(jnp.float32)

    tokens = at_least_one(mask)
    return Counts(
        tokens=tokens,
        value_tokens=tokens if value_mask is None else at_least_one(value_mask),
        sequences=at_least_one(jnp.any(mask, axis=1)),
    )


def separate_networks(
    *, token_logprobs_fn: TokenLogprobsFn, values_fn: ValuesFn
) -> ActorCriticFn:
    """Separate actor and critic: neither loss affects the other's parameters.

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
    policy_loss_key: bool = False,
    num_microbatches: int = 1,
) -> Objective:
    """PPO's clipped policy and value losses, with or without a KL term.

        loss = actor_loss + value_loss.coef · critic_loss

    The divisor is the minibatch's `Counts`.

    Args:
        forward: actor and critic, over `ActorCritic` parameters.
        temperature: the sampler's.
        policy_loss: options of the actor's loss; its aggregation is also used for the
            critic.
        value_loss: options of the critic's loss.
        kl: options of the KL term, if the experience has one.
        policy_loss_fn: instead of the surrogate named by `policy_loss`; see
            `rlhf_jax.algo.policy_losses`. Surrogate options are then rejected.
        policy_loss_key: pass `policy_loss_fn` a keyword `key`, a new one per
            microbatch: for stochastic losses such as `clip_cov_loss`.
        num_microbatches: number of microbatches per minibatch; used with
            `policy_loss.mean_of_means`, where each divides by its own counts.
    """
    value_loss.validate("value_loss")
    actor_term = _actor_term(policy_loss, kl, policy_loss_fn, policy_loss_key)

    def objective(
        params: ActorCritic,
        experience: Experience,
        counts: Counts,
        key: Array | None = None,
    ) -> tuple[Array, Metrics]:
        counts = _divisors(counts, experience, policy_loss, num_microbatches)
        logprobs, entropy, values = forward(
            params,
            *_sequences(experience),
            response_length=experience.mask.shape[1],
            temperature=temperature,
        )
        for_actor, metrics = actor_term(logprobs, entropy, experience, counts, key)
        for_critic, critic_metrics = critic_loss(
            values,
            experience,
            value_clip_eps=value_loss.clip_eps,
            half=value_loss.half,
            aggregation=policy_loss.aggregation,
            num_tokens=counts.value_tokens,
            num_sequences=counts.sequences,
        )
        metrics |= _named("value", critic_metrics)
        return for_actor + value_loss.coef * for_critic, metrics

    return objective


def critic_free_objective(
    token_logprobs_fn: TokenLogprobsFn,
    *,
    temperature: Scalar = 1.0,
    policy_loss: PolicyLossOptions = PolicyLossOptions(),
    kl: KLOptions = KLOptions(),
    policy_loss_fn: PolicyLossFn | None = None,
    policy_loss_key: bool = False,
    num_microbatches: int = 1,
) -> Objective:
    """The actor's loss only: GRPO and other critic-free methods.

    Takes `ActorCritic` parameters with an empty critic, so that states and updates are
    the same as for PPO. The divisor is the minibatch's `Counts`.

    Args:
        token_logprobs_fn: of the actor.
        temperature: the sampler's.
        policy_loss: options of the loss.
        kl: options of the KL term, if the experience has one.
        policy_loss_fn: as in `ppo_objective`.
        policy_loss_key: as in `ppo_objective`.
        num_microbatches: as in `ppo_objective`.
    """
    actor_term = _actor_term(policy_loss, kl, policy_loss_fn, policy_loss_key)

    def objective(
        params: ActorCritic,
        experience: Experience,
        counts: Counts,
        key: Array | None = None,
    ) -> tuple[Array, Metrics]:
        counts = _divisors(counts, experience, policy_loss, num_microbatches)
        logprobs, entropy = token_logprobs_fn(
            params.actor,
            *_sequences(experience),
            response_length=experience.mask.shape[1],
            temperature=temperature,
        )
        return actor_term(logprobs, entropy, experience, counts, key)

    return objective


ActorTerm = Callable[
    [Array, Array, Experience, Counts, Array | None], tuple[Array, Metrics]
]


def _actor_term(
    policy_loss: PolicyLossOptions,
    kl: KLOptions,
    policy_loss_fn: Callable[..., Array] | None,
    policy_loss_key: bool,
) -> ActorTerm:
    """`(logprobs, entropy, experience, counts, key) -> (loss, metrics)`."""
    policy_loss.validate("policy_loss")
    kl.validate("kl")
    options = _surrogate_options(policy_loss, policy_loss_fn, policy_loss_key)
    kl_fn = partial(
        kl_estimate,
        estimator=kl.estimator,
        # ρ is a weight, so the weighted estimator must have the gradient of the KL.
        straight_through=kl.straight_through or kl.importance_weighted,
        log_ratio_clamp=kl.log_ratio_clamp,
        clamp=kl.clamp,
    )

    def actor_term(
        logprobs: Array,
        entropy: Array,
        experience: Experience,
        counts: Counts,
        key: Array | None,
    ) -> tuple[Array, Metrics]:
        _check_made_with(experience, kl, policy_loss)
        drawn: dict[str, Any] = {}
        if policy_loss_key:
            assert policy_loss_fn is not None
            check(
                key is not None,
                "policy_loss_key",
                True,
                "the objective got no key; build the update with objective_key=True",
            )
            drawn = {"policy_loss_fn": partial(policy_loss_fn, key=key)}
        loss, metrics = actor_loss(
            logprobs,
            experience,
            entropy=entropy,
            kl_fn=kl_fn,
            importance_weighted_kl=kl.importance_weighted,
            entropy_coef=policy_loss.entropy_coef,
            aggregation=policy_loss.aggregation,
            num_tokens=counts.tokens,
            num_sequences=counts.sequences,
            **(options | drawn),
        )
        return loss, _named("policy", metrics)

    return actor_term


def _named(group: str, metrics: Metrics) -> Metrics:
    """Metrics as they are logged: `policy_loss` is `policy/loss`."""
    return {
        f"{group}/{name.removeprefix(f'{group}_')}": value
        for name, value in metrics.items()
    }


def _check_made_with(
    experience: Experience, kl: KLOptions, policy_loss: PolicyLossOptions
) -> None:
    """Raises ValueError if the experience was made with other options."""
    if (experience.kl_coef is None) != (kl.place != "loss"):
        raise ValueError(
            f"kl.place={kl.place!r}: give the objective the kl options used for the "
            "experience"
        )
    if (experience.weights is None) != (policy_loss.sampler_correction == "none"):
        raise ValueError(
            f"sampler_correction={policy_loss.sampler_correction!r}: give the "
            "objective the policy_loss options used for the experience"
        )


def _sequences(experience: Experience) -> tuple[Array, Array]:
    """Tokens and mask, `[B, S]`, to run the network on."""
    if experience.tokens is None or experience.sequence_mask is None:
        raise ValueError("the experience has no tokens and sequence_mask")
    return experience.tokens, experience.sequence_mask


_OF_SURROGATES = (
    "surrogate",
    "ratio_bound",
    "clip_eps",
    "clip_eps_high",
    "dual_clip",
    "log_ratio_clamp",
)


def _surrogate_options(
    options: PolicyLossOptions,
    policy_loss_fn: PolicyLossFn | None,
    policy_loss_key: bool,
) -> dict[str, Any]:
    """Keywords of `actor_loss`; None keeps the loss's own default."""
    if policy_loss_fn is not None:
        why = "has no effect with policy_loss_fn"
        require_defaults(options, "policy_loss", *_OF_SURROGATES, why=why)
        return {"policy_loss_fn": policy_loss_fn}
    check(
        not policy_loss_key, "policy_loss_key", policy_loss_key, "needs policy_loss_fn"
    )
    clips: dict[str, Any] = {}
    if options.clip_eps is not None:
        clips = {"clip_eps": options.clip_eps, "clip_eps_high": options.clip_eps_high}
    elif options.clip_eps_high is not None:
        clips = {"clip_eps_high": options.clip_eps_high}
    match options.surrogate:
        case "gspo":
            return {"policy_loss_fn": partial(gspo_loss, **clips)}
        case "gmpo":
            return {"policy_loss_fn": partial(gmpo_loss, **clips)}
        case "cispo" if options.ratio_bound is not None:
            return {"policy_loss_fn": partial(cispo_loss, bound=options.ratio_bound)}
        case "cispo":
            return {"policy_loss_fn": cispo_loss}
        case "sapo":
            return {"policy_loss_fn": sapo_loss}
        case "reinforce":
            return {"policy_loss_fn": reinforce_loss}
    return clips | {
        "dual_clip": options.dual_clip,
        "log_ratio_clamp": options.log_ratio_clamp,
    }


def _divisors(
    counts: Counts,
    experience: Experience,
    policy_loss: PolicyLossOptions,
    num_microbatches: int,
) -> Counts:
    """The minibatch's counts, or with `mean_of_means` those of this microbatch."""
    if not policy_loss.mean_of_means:
        return counts
    own = count_experience(experience)
    return jax.tree.map(lambda n: n * num_microbatches, own)
