"""Stage 3: PPO against a reward, with a KL penalty to the reference."""

import dataclasses
from functools import partial

import jax

from rlhf_jax.learner.train_state import TrainState, init_train_state
from rlhf_jax.recipes.four_models import load_four_models
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.policy_configs import PPOConfig
from rlhf_jax.recipes.policy_loop import PolicyStage, train_policy
from rlhf_jax.recipes.ppo_programs import (
    Carried,
    learning_rates,
    make_optimizers,
    make_programs,
    ppo_step,
    reference_moments,
)
from rlhf_jax.recipes.prompt_batches import PromptData, read_prompt_data
from rlhf_jax.recipes.rewards import Judge, RewardFunctions
from rlhf_jax.recipes.session import check_start
from rlhf_jax.runtime.mesh import make_mesh, put_batch
from rlhf_jax.runtime.run_directory import RunDirectory

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
    language = Language.load(config.policy)
    data = read_prompt_data(config, language, stage="ppo")
    with RewardFunctions(config) as functions:
        functions.probe(data)
        return _train(config, language, data, functions)


def _train(
    config: PPOConfig, language: Language, data: PromptData, functions: RewardFunctions
) -> RunDirectory:
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)

    # ---- four models ----
    models, params = load_four_models(config, language, mesh, prompt_width=data.width)
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
        stop_ids=language.stop_ids(config.stop),
        pad_id=language.pad_id,
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
        language=language,
        mesh=mesh,
        eval_key=eval_key,
    )
