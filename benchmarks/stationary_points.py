"""Stationary points of methods: policies whose expected update is zero.

A policy is a table of logits over the prefixes of a small language, a critic a table of
values. One batch contains every response, weighted by its probability: the limit of a
large batch. Each round sets the critic to the fixed point of the method's value
targets, then moves the policy along the expected gradient of the method's loss at ratio
1, until that gradient vanishes.

The library computes advantages (`make_experience`) and losses (`actor_loss`). Only
whitening is done here: its statistics must be weighted by probability, and the library
weights every row equally.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from every_response import Language, language_of, scored_rollout

from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import actor_loss
from rlhf_jax.algo.options import KLOptions, ScoreOptions
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.scores import ScoreMoments
from rlhf_jax.algo.types import Array, Experience
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.rollout.experience import final_scores, make_experience
from rlhf_jax.tasks.enumerable import EnumerableTask

WHITENING_EPS = 1e-8
TOLERANCE = 1e-6  # of the norm of the gradient, over that at the reference


# ---- one expected update ----


def essentials(method: PPOMethod) -> PPOMethod:
    """Options that affect an expected update at ratio 1; others are at their defaults.

    What scores become before any reward is `method_scores`; of a batch without end
    every part is like the whole, and ddof is nothing.
    """
    scores, kl = method.scores, method.kl
    return PPOMethod(
        kl=KLOptions(
            place=kl.place,
            estimator=kl.estimator,
            straight_through=kl.straight_through,
            log_ratio_clamp=kl.log_ratio_clamp,
            clamp=kl.clamp,
        ),
        scores=ScoreOptions(
            missing_eos="mask" if scores.missing_eos == "mask" else "keep",
            position=scores.position,
            end_value=scores.end_value,
            whiten_rewards=scores.whiten_rewards,
        ),
        advantages=dataclasses.replace(
            method.advantages,
            whiten="none" if method.advantages.whiten == "none" else "batch",
            whiten_shards=1,
            ddof=0,
        ),
        policy_loss=dataclasses.replace(method.policy_loss, mean_of_means=False),
    )


def method_scores(language: Language, method: PPOMethod) -> Array:
    """`[K]`: the method's scores after normalization and penalties, before its KL."""
    scored = scored_rollout(
        language, language.ref_logits, jnp.zeros(language.num_critic_states)
    )
    moments = None
    if method.scores.normalization != "none":  # over all of the reference's responses
        probs = language.probs(language.ref_logits)
        mean = probs @ language.scores
        squares = probs @ jnp.square(language.scores - mean)
        moments = ScoreMoments(count=jnp.ones(()), mean=mean, squares=squares)
    return final_scores(scored.rollout, scored.scores, method.scores, moments)


def experience_of(
    language: Language,
    logits: Array,
    critic: Array,
    method: PPOMethod,
    beta: float,
) -> Experience:
    """By the library, but for advantage whitening, which is left out.

    The method is one of `essentials`, the language has the scores of `method_scores`.
    """
    scored = scored_rollout(language, logits, critic)
    kl_coef = jnp.asarray(beta)
    if method.scores.whiten_rewards:
        assert method.kl.estimator == "k1" and method.kl.place == "reward"
        ref_logprobs = language.logprobs(language.ref_logits)
        rewards, _ = shape_rewards(
            scored.scores,
            scored.logprobs,
            ref_logprobs,
            language.mask,
            kl_coef=beta,
            score_position=method.scores.position,
        )
        weights = jnp.where(language.mask, language.probs(logits)[:, None], 0.0)
        mean, deviation = weighted_moments(rewards, weights)
        # (r − μ) / σ + μ: score and β over σ, and on every token the constant
        # μ · (σ − 1) / σ, as which a shifted log π_ref comes out of k1.
        scored = dataclasses.replace(
            scored,
            scores=scored.scores / deviation,
            ref_logprobs=ref_logprobs + mean * (deviation - 1.0) / kl_coef,
        )
        kl_coef = kl_coef / deviation
    experience, _ = make_experience(
        scored,
        kl_coef=kl_coef,
        kl=method.kl,
        scores=dataclasses.replace(method.scores, whiten_rewards=False),
        advantages=dataclasses.replace(
            method.advantages, whiten="none", center=True, ddof=0
        ),
    )
    return experience


def weighted_moments(x: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted mean and standard deviation, as in `masked_whiten` for equal weights."""
    total = jnp.sum(weights)
    mean = jnp.sum(jnp.where(weights > 0, x * weights, 0.0)) / total
    squares = jnp.where(weights > 0, jnp.square(x - mean) * weights, 0.0)
    return mean, jnp.sqrt(jnp.sum(squares) / total + WHITENING_EPS)


def fixed_point_critic(
    language: Language,
    logits: Array,
    critic: Array,
    method: PPOMethod,
    beta: float,
) -> Array:
    """`[N + K]`: the critic that equals the mean of its targets in every state.

    States that the method does not train keep their value.
    """
    probs = language.probs(logits)[:, None]

    def regress(_: Any, critic: Array) -> Array:
        experience = experience_of(language, logits, critic, method, beta)
        assert experience.returns is not None
        mask = experience.mask
        if experience.value_mask is not None:
            mask = experience.value_mask
        weights = jnp.where(mask, probs, 0.0)
        states = language.critic_states
        visits = jnp.zeros_like(critic).at[states].add(weights)
        total = jnp.zeros_like(critic).at[states].add(weights * experience.returns)
        return jnp.where(visits > 0, total / jnp.where(visits > 0, visits, 1.0), critic)

    # Each sweep settles one more level of the tree, the ends of responses first.
    sweeps = language.tokens.shape[1] + 1
    return jax.lax.fori_loop(0, sweeps, regress, critic)


def expected_step(
    language: Language,
    logits: Array,
    critic: Array,
    method: PPOMethod,
    beta: float,
) -> tuple[Array, Array]:
    """The expected gradient of the actor, and the natural gradient, both `[N, V]`.

    Where advantages are whitened both are multiplied by their standard deviation: a
    step size, without which a whitened update never becomes small.
    """
    probs = language.probs(logits)
    experience = experience_of(language, logits, critic, method, beta)
    weights = jnp.where(experience.mask, probs[:, None], 0.0)
    deviation = jnp.ones(())
    if method.advantages.whiten != "none":
        mean, deviation = weighted_moments(experience.advantages, weights)
        center = mean if method.advantages.center else 0.0
        whitened = (experience.advantages - center) / deviation
        experience = dataclasses.replace(experience, advantages=whitened)
    in_loss = None if experience.kl_coef is None else experience.kl_coef * probs
    experience = dataclasses.replace(experience, weights=weights, kl_coef=in_loss)
    by_token = method.policy_loss.aggregation == "token-mean"

    def loss(logprobs: Array) -> Array:
        # No preset has a bonus for entropy, and nothing is clipped at ratio 1.
        return actor_loss(
            logprobs,
            experience,
            kl_fn=functools.partial(
                kl_estimate,
                estimator=method.kl.estimator,
                straight_through=method.kl.straight_through,
                log_ratio_clamp=method.kl.log_ratio_clamp,
                clamp=method.kl.clamp,
            ),
            aggregation=method.policy_loss.aggregation,
            num_tokens=jnp.sum(weights),
            num_sequences=1.0,  # the weights add up to one response
        )[0]

    per_token = -deviation * jax.grad(loss)(language.logprobs(logits))
    place = language.states, language.tokens
    zeros = jnp.zeros_like(logits)
    total = zeros.at[place].add(jnp.where(language.mask, per_token, 0.0))
    visits = zeros.at[place].add(jnp.where(language.mask, probs[:, None], 0.0))
    # ∂log π(a|s) / ∂logits(s, b) = [a = b] − π(b|s)
    policy = jax.nn.softmax(logits, axis=-1)
    gradient = total - policy * jnp.sum(total, axis=1, keepdims=True)
    # The Fisher matrix of a softmax table is d(s) · (diag π(·|s) − π πᵀ).
    natural = jnp.where(visits > 0, total / jnp.where(visits > 0, visits, 1.0), 0.0)
    return gradient, natural * (jnp.sum(weights) if by_token else 1.0)


# ---- to the end ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class StationaryPoint:
    """Result of following a method's expected updates."""

    probs: np.ndarray  # [K] float64, of the task's responses, read through the stop
    gradient: float  # norm of the expected gradient, over that at the reference
    steps: int


@functools.partial(jax.jit, static_argnames="method")
def _follow(
    language: Language,
    critic: Array,
    beta: float,
    rate: float,
    max_steps: int,
    *,
    method: PPOMethod,
) -> tuple[Array, Array, Array]:
    """Logits, norm of the last gradient over that of the first, steps."""

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        logits, critic, _, first, count = carry
        critic = fixed_point_critic(language, logits, critic, method, beta)
        gradient, natural = expected_step(language, logits, critic, method, beta)
        norm = jnp.linalg.norm(gradient)
        moved = jax.nn.log_softmax(logits + rate * natural, axis=-1)
        first = jnp.where(count == 0, norm, first)
        return moved, critic, norm, first, count + 1

    def going(carry: tuple[Array, ...]) -> Array:
        _, _, norm, first, count = carry
        return (count < max_steps) & ((count == 0) | (norm > TOLERANCE * first))

    one = jnp.ones(())
    start = (language.ref_logits, critic, one, one, jnp.zeros((), jnp.int32))
    logits, _, norm, first, count = jax.lax.while_loop(going, step, start)
    return logits, norm / first, count


def stationary_point(
    task: EnumerableTask,
    method: PPOMethod,
    *,
    beta: float,
    end_values: np.ndarray | None = None,
    rate: float = 1.0,
    max_steps: int = 2000,
) -> StationaryPoint:
    """Follows the expected update from the reference until it vanishes.

    Args:
        task: the language, its reference and scores.
        method: only options that affect an expected update at ratio 1 matter.
        beta: replaces the method's β.
        end_values: `[K]`, initial values in the states after the last token; default:
            the scores, as for a critic initialized from the reward model.
        rate: step size of the natural gradient, in units of reward.
        max_steps: maximum number of steps.
    """
    language = language_of(task, method)
    language = dataclasses.replace(language, scores=method_scores(language, method))
    ends = language.scores if end_values is None else end_values
    critic = jnp.concatenate(
        [jnp.zeros(len(language.ref_logits)), jnp.asarray(ends, jnp.float32)]
    )
    logits, gradient, steps = _follow(
        language, critic, beta, rate, max_steps, method=essentials(method)
    )
    probs = np.asarray(language.probs(logits), np.float64)
    return StationaryPoint(
        probs=np.bincount(language.text, probs / probs.sum(), len(task.scores)),
        gradient=float(gradient),
        steps=int(steps),
    )
