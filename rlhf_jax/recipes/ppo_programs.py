"""The compiled programs of PPO, made of a configuration, and one update with them."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax.algo.kl import adapt_kl_coef
from rlhf_jax.algo.options import check
from rlhf_jax.algo.score_moments import (
    ScoreMoments,
    init_score_moments,
    update_score_moments,
)
from rlhf_jax.algo.types import Array, Experience, Params, Prompts, Rollout
from rlhf_jax.learner.objectives import ppo_objective
from rlhf_jax.learner.train_state import ActorCritic, TrainState, step_keys
from rlhf_jax.learner.update import UpdateFn, make_update
from rlhf_jax.recipes.answers import Sampler, make_sampler
from rlhf_jax.recipes.four_models import FourModels
from rlhf_jax.recipes.policy_configs import GRPOConfig, PPOConfig
from rlhf_jax.recipes.rewards import Judge, Rewards, ScoreRollout, score_program
from rlhf_jax.recipes.supervised import optimizer_of
from rlhf_jax.rollout.experience import make_experience, sampler_gap, whiten_minibatch
from rlhf_jax.rollout.scoring import mark_stops, score_rollout
from rlhf_jax.runtime.batches import Batches
from rlhf_jax.runtime.mesh import put_batch

NUM_NORMALIZATION_BATCHES = 4

Carried = dict[str, Any]
"""Fields of the state that scoring changes: the KL coefficient, the score moments."""

ExperienceFn = Callable[
    [TrainState, ActorCritic, Params | None, Array, Rollout],
    tuple[Experience, Carried, dict[str, Array]],
]


@dataclasses.dataclass(frozen=True)
class Programs:
    """What one PPO update runs, compiled."""

    sample: Sampler
    answer: Sampler  # for evaluation: as `sample`, but always to the stop token
    score: ScoreRollout
    experience_of: ExperienceFn
    update: UpdateFn


def make_programs(
    config: PPOConfig,
    models: FourModels,
    optimizers: ActorCritic,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    state_sharding: TrainState | None = None,
) -> Programs:
    """Sampling, scoring and updating as the configuration asks for them.

    Args:
        config: of the run.
        models: how to call the four.
        optimizers: of actor and critic.
        stop_ids: tokens that end an answer.
        pad_id: written after the end of an answer.
        state_sharding: `NamedSharding`s in the shape of the state; None: one device.
    """
    sampler = partial(
        make_sampler,
        models.policy,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        pad_id=pad_id,
    )
    answer = sample = sampler(stop_ids=stop_ids)
    if config.after_stop == "keep":
        sample = sampler(stop_ids=())
    prepare = None
    if config.advantages.whiten == "minibatch":
        prepare = partial(whiten_minibatch, options=config.advantages)
    update = make_update(
        ppo_objective(
            models.forward,
            temperature=config.temperature,
            policy_loss=config.policy_loss,
            value_loss=config.value_loss,
            kl=config.kl,
            num_microbatches=config.microbatches,
        ),
        optimizers,
        num_epochs=config.epochs,
        num_minibatches=config.minibatches,
        num_microbatches=config.microbatches,
        prepare=prepare,
        max_kl=config.max_update_kl,
        critic_warmup=config.critic_warmup,
        slow_critic_decay=config.advantages.slow_critic_decay,
        assemble=None if models.lora is None else models.assemble,
        state_sharding=state_sharding,
    )
    cut = config.after_stop == "cut"
    return Programs(
        sample=sample,
        answer=answer,
        score=score_program(models, stop_ids=stop_ids, cut=cut),
        experience_of=_experience_program(config, models, stop_ids),
        update=update,
    )


def ppo_step(
    state: TrainState,
    prompts: Prompts,
    models: FourModels,
    programs: Programs,
    reward_of: Callable[[Rollout], Rewards],
) -> tuple[TrainState, Carried, dict[str, float]]:
    """One PPO update: rollout, rewards, scoring, epochs.

    Returns:
        The new state, what else the next update starts from (the state keeps the old
        until the update is known to be sound), and metrics on the host.
    """
    began = time.perf_counter()
    rollout_key, _ = step_keys(state)
    rollout = jax.block_until_ready(
        programs.sample(rollout_key, models.actor(state.params.actor), prompts)
    )
    rolled_out = time.perf_counter()
    rewards = reward_of(rollout)
    judged = time.perf_counter()
    experience, carried, scored = programs.experience_of(
        state, models.frozen, models.reference, rewards.scores, rollout
    )
    state, updated = programs.update(state, experience, models.frozen)
    metrics = jax.device_get(scored | updated) | rewards.metrics
    seconds = time.perf_counter() - began
    num_tokens = float(jnp.sum(rollout.lengths))
    metrics |= {
        "rollout/tokens": num_tokens,
        "time/step_seconds": seconds,
        "time/rollout_seconds": rolled_out - began,
        "time/reward_seconds": judged - rolled_out,
        "time/tokens_per_second": num_tokens / seconds,
    }
    return state, carried, metrics


def reference_moments(
    key: Array,
    batches: Batches,
    models: FourModels,
    programs: Programs,
    judge: Judge,
    mesh: Mesh,
    sharding: ScoreMoments,
) -> ScoreMoments:
    """Of the scores of the reference's answers to the first batches of prompts.

    Answers end at their stop token: what follows it, under `after_stop="keep"`, the
    reward model does not read in training either.

    Raises:
        ValueError: where all scores are the same.
    """
    add = jax.jit(update_score_moments)
    moments = init_score_moments()
    for number in range(NUM_NORMALIZATION_BATCHES):
        batch = batches[number]
        batch_key = jax.random.fold_in(key, number)
        rollout = programs.answer(
            batch_key, models.reference, put_batch(mesh, batch.prompts)
        )
        moments = add(moments, judge.of_rollout(rollout, batch).scores)
    check(
        bool(moments.squares > 0),
        "scores.normalization",
        "reference",
        f"all {int(moments.count)} answers of the reference have the same score, so "
        "there is no scale to bring to 1",
    )
    # As the update hands them back: another sharding would compile everything again.
    return jax.device_put(moments, sharding)


def make_optimizers(config: PPOConfig) -> tuple[ActorCritic, ActorCritic]:
    """Optimizers and learning-rate schedules of actor and critic.

    The actor's schedule begins when the critic's warm-up is over.
    """
    steps_per_update = config.epochs * config.minibatches
    actor, actor_rate = optimizer_of(
        config.actor_optimizer,
        total_steps=(config.updates - config.critic_warmup) * steps_per_update,
    )
    critic, critic_rate = optimizer_of(
        config.critic_optimizer, total_steps=config.updates * steps_per_update
    )
    return (
        ActorCritic(actor=actor, critic=critic),
        ActorCritic(actor=actor_rate, critic=critic_rate),
    )


def learning_rates(schedules: ActorCritic, opt_state: ActorCritic) -> dict[str, float]:
    """Rates of the next optimizer step; steps that were not taken do not count.

    A schedule that is None is of a critic that there is not.
    """
    return {
        f"optim/{name}_learning_rate": float(schedule(_steps_taken(state)))
        for name, schedule, state in (
            ("actor", schedules.actor, opt_state.actor),
            ("critic", schedules.critic, opt_state.critic),
        )
        if schedule is not None
    }


def _steps_taken(opt_state: optax.OptState) -> Array:
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return count


def _experience_program(
    config: PPOConfig, models: FourModels, stop_ids: Sequence[int]
) -> ExperienceFn:
    """Scoring, shaping, advantages and the next KL coefficient as one program.

    Returns:
        `(state, frozen, reference, scores, rollout) -> (experience, carried, metrics)`.
    """
    recompute = recomputes_logprobs(config)

    def experience_of(
        state: TrainState,
        frozen: ActorCritic,
        reference: Params | None,
        scores: Array,
        rollout: Rollout,
    ) -> tuple[Experience, Carried, dict[str, Array]]:
        params = models.assemble(state.params, frozen)
        slow_critic = state.slow_critic
        if slow_critic is not None:
            slow_critic = models.assemble(slow_critic, frozen.critic)
        if config.after_stop == "keep":
            rollout, _ = mark_stops(rollout, stop_ids)
        scored = score_rollout(
            params.actor if recompute else None,
            models.critic_of(params),
            reference,
            scores,
            rollout,
            token_logprobs_fn=models.policy.token_logprobs,
            values_fn=models.values_fn,
            temperature=config.temperature,
            slow_critic=slow_critic,
            with_end_values=config.advantages.bootstrap_truncated,
        )
        moments = state.score_moments
        if config.scores.normalization == "running":
            moments = update_score_moments(moments, scored.scores)
        experience, metrics = make_experience(
            scored,
            kl_coef=state.kl_coef,
            kl=config.kl,
            scores=config.scores,
            advantages=config.advantages,
            policy_loss=config.policy_loss,
            score_moments=None if config.scores.normalization == "none" else moments,
        )
        if recompute:
            metrics |= sampler_gap(scored)
        kl_coef = next_kl_coef(config, state.kl_coef, metrics)
        return experience, {"kl_coef": kl_coef, "score_moments": moments}, metrics

    return jax.jit(experience_of)


def recomputes_logprobs(config: PPOConfig | GRPOConfig) -> bool:
    """Whether old log-probabilities are computed anew, or are the sampler's."""
    if config.old_logprobs == "auto":
        exact = config.dtype == "float32" and jax.default_backend() == "cpu"
        return not exact
    return config.old_logprobs == "recomputed"


def next_kl_coef(
    config: PPOConfig | GRPOConfig, kl_coef: Array, metrics: dict[str, Array]
) -> Array:
    """`[]`, β of the next update; the same where it is not adaptive."""
    if not config.kl.adapts:
        return kl_coef
    assert config.kl.target is not None
    unit = {"sequence-sum": "kl/sequence", "token-mean": "kl/token"}
    return adapt_kl_coef(
        kl_coef,
        metrics[unit[config.kl.unit]],
        target_kl=config.kl.target,
        horizon=config.kl.horizon,
        num_episodes=config.batch_size,
    )
