"""Stage 3: PPO against a reward, with a KL penalty to the reference."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.options import check
from rlhf_jax.algo.scores import ScoreMoments, init_score_moments, update_score_moments
from rlhf_jax.algo.types import Array, Experience, Params, Prompts, Rollout
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.objectives import ppo_objective
from rlhf_jax.learner.train_state import (
    ActorCritic,
    TrainState,
    init_train_state,
    step_keys,
)
from rlhf_jax.learner.update import UpdateFn, make_update
from rlhf_jax.recipes.answers import Sampler, make_sampler
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.optimizers import learning_rates, make_optimizers
from rlhf_jax.recipes.policy_loop import (
    Carried,
    PolicyStage,
    next_kl_coef,
    recomputes_logprobs,
    train_policy,
)
from rlhf_jax.recipes.policy_models import FourModels, load_four_models
from rlhf_jax.recipes.prompt_batches import PromptData, read_prompt_data
from rlhf_jax.recipes.scorer import (
    Judge,
    RewardFunctions,
    Rewards,
    ScoreRollout,
    score_program,
)
from rlhf_jax.rollout.experience import make_experience, sampler_gap, whiten_minibatch
from rlhf_jax.rollout.scoring import mark_stops, score_rollout
from rlhf_jax.run.devices import make_mesh, put_batch
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start

NUM_NORMALIZATION_BATCHES = 4


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


SHOWN = {
    "score": "reward/score_mean",
    "KL": "kl/sequence",
    "length": "response/length_mean",
    "held-out score": "eval/score_mean",
}


def run(config: PPOConfig) -> RunDirectory:
    """Trains, and writes the policy as a Hugging Face directory.

    Raises:
        ValueError: on bad input, before anything is compiled.
        RewardFunctionError: where a reward function fails.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="ppo")
    tokenization = Tokenization.load(config.policy)
    data = read_prompt_data(config, tokenization, stage="ppo")
    with RewardFunctions(config) as functions:
        functions.probe(data)
        return _train(config, tokenization, data, functions)


def _train(
    config: PPOConfig,
    tokenization: Tokenization,
    data: PromptData,
    functions: RewardFunctions,
) -> RunDirectory:
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)

    # ---- four models ----
    models, params = load_four_models(
        config, tokenization, mesh, prompt_width=data.width
    )
    run_key, eval_key, moments_key = jax.random.split(jax.random.key(config.seed), 3)
    optimizers, schedules = make_optimizers(config)
    state = init_train_state(
        run_key,
        params,
        optimizers,
        kl_coef=config.kl.coef,
        slow_critic=config.advantages.slow_critic_decay is not None,
    )
    state, sharding = place_state(state, mesh)

    programs = make_programs(
        config,
        models,
        optimizers,
        stop_ids=tokenization.stop_ids(config.stop),
        pad_id=tokenization.pad_id,
        state_sharding=sharding,
    )

    # ---- train ----
    def step(
        judge: Judge, number: int, state: TrainState
    ) -> tuple[TrainState, Carried, dict[str, float]]:
        batch = batches[number - 1]
        rates = learning_rates(schedules, state.opt_state)
        state, carried, metrics = ppo_step(
            state,
            put_batch(mesh, batch.prompts),
            models,
            programs,
            partial(judge.of_rollout, batch=batch),
        )
        return state, carried, metrics | rates

    def begin(judge: Judge, state: TrainState) -> TrainState:
        if config.scores.normalization != "reference":
            return state
        like = sharding.score_moments
        moments = reference_moments(
            moments_key, batches, models, programs, judge, mesh, like
        )
        return dataclasses.replace(state, score_moments=moments)

    stage = PolicyStage(
        name="ppo",
        shown=SHOWN,
        models=models,
        answer=programs.answer,
        score=programs.score,
        step=step,
        begin=begin,
    )
    return train_policy(
        config,
        stage,
        state,
        data=data,
        functions=functions,
        tokenization=tokenization,
        mesh=mesh,
        eval_key=eval_key,
    )
