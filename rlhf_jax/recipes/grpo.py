"""GRPO and its relatives: groups of answers in place of a critic."""

from collections.abc import Callable
from functools import partial

import jax

from rlhf_jax.algo.options import check
from rlhf_jax.learner.train_state import ActorCritic, TrainState, init_train_state
from rlhf_jax.recipes.adapted import Networks
from rlhf_jax.recipes.grpo_programs import (
    grpo_step,
    make_grpo_optimizers,
    make_grpo_programs,
)
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.policy_configs import GRPOConfig
from rlhf_jax.recipes.policy_loop import PolicyStage, train_policy
from rlhf_jax.recipes.policy_models import load_policy_models
from rlhf_jax.recipes.ppo_programs import Carried, learning_rates
from rlhf_jax.recipes.prompt_batches import (
    PromptBatch,
    PromptData,
    read_prompt_data,
)
from rlhf_jax.recipes.rewards import Judge, RewardFunctions
from rlhf_jax.recipes.session import check_start
from rlhf_jax.runtime.mesh import make_mesh, put_batch
from rlhf_jax.runtime.run_directory import RunDirectory

SHOWN = {
    "score": "reward/score_mean",
    "no signal": "group/no_signal",
    "length": "response/length_mean",
    "held-out score": "eval/score_mean",
    "pass@1": "eval/pass_at_1",
}


def run(config: GRPOConfig) -> RunDirectory:
    """Trains, and writes the policy as a Hugging Face directory.

    Raises:
        ValueError: on bad input, before anything is compiled.
        RewardFunctionError: where a reward function fails.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="grpo")
    language = Language.load(config.policy)
    data = read_prompt_data(config, language, stage="grpo")
    with RewardFunctions(config) as functions:
        functions.probe(data)
        return _train(config, language, data, functions)


def _train(
    config: GRPOConfig, language: Language, data: PromptData, functions: RewardFunctions
) -> RunDirectory:
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    prompts_of = _prompt_order(config, data)

    # ---- models ----
    models, actor = load_policy_models(
        config, language, Networks(config, mesh), prompt_width=data.width
    )
    run_key, eval_key = jax.random.split(jax.random.key(config.seed))
    optimizers, schedules = make_grpo_optimizers(config)
    state = init_train_state(
        run_key,
        ActorCritic(actor=actor, critic={}),
        optimizers,
        kl_coef=config.kl.coef,
        old_policy=config.refresh_every > 1,
    )
    state, sharding = place_state(state, mesh)

    programs = make_grpo_programs(
        config,
        models,
        optimizers,
        stop_ids=language.stop_ids(config.stop),
        pad_id=language.pad_id,
        mesh=mesh,
        state_sharding=sharding,
    )

    # ---- train ----
    def step(
        judge: Judge, number: int, state: TrainState
    ) -> tuple[TrainState, Carried, dict[str, float]]:
        rates = learning_rates(schedules, state.opt_state)
        state, carried, metrics = grpo_step(
            state,
            partial(prompts_of, number),
            config,
            models,
            programs,
            judge.of_rollout,
            partial(put_batch, mesh),
        )
        return state, carried, metrics | rates

    stage = PolicyStage(
        name="grpo",
        shown=SHOWN,
        models=models,
        answer=programs.sample,
        score=programs.score,
        step=step,
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


def _prompt_order(
    config: GRPOConfig, data: PromptData
) -> Callable[[int, int], PromptBatch]:
    """`(step, round) -> PromptBatch`: which prompts are answered when.

    Later rounds of a step have an order of their own, so that no prompt of the first
    rounds is passed over, and a resumed run needs no count of what was resampled.
    """
    number = config.batch_size // config.group_size
    check(
        number <= len(data.rows),
        "batch-size",
        config.batch_size,
        f"takes {number} prompts at group-size={config.group_size}; there are "
        f"{len(data.rows)} to train on",
    )
    first = data.batches(batch_size=number, seed=config.seed)
    further = data.batches(batch_size=number, seed=config.seed, stream=1)

    def prompts_of(step: int, round_number: int) -> PromptBatch:
        if round_number == 0:
            return first[step - 1]
        return further[(step - 1) * config.resample + round_number - 1]

    return prompts_of
