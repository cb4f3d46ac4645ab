"""GRPO and its relatives: groups of answers in place of a critic."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.algo.options import check
from rlhf_jax.algo.types import Array, Experience, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.interfaces import BATCH_AXES
from rlhf_jax.learner.objectives import critic_free_objective
from rlhf_jax.learner.train_state import ActorCritic, TrainState, init_train_state
from rlhf_jax.learner.update import make_update
from rlhf_jax.recipes.answers import make_sampler
from rlhf_jax.recipes.group_sampling import (
    ExperienceFn,
    GRPOPrograms,
    Judged,
    Put,
    RewardFn,
    _answering,
    _greedy_answers,
    _has_signal,
    _replace_rows,
    sample_groups,
)
from rlhf_jax.recipes.networks import Networks, place_state
from rlhf_jax.recipes.optimizers import learning_rates, make_grpo_optimizers
from rlhf_jax.recipes.policy_loop import (
    Carried,
    PolicyStage,
    next_kl_coef,
    recomputes_logprobs,
    train_policy,
)
from rlhf_jax.recipes.policy_models import PolicyModels, load_policy_models
from rlhf_jax.recipes.prompt_batches import PromptBatch, PromptData, read_prompt_data
from rlhf_jax.recipes.scorer import Judge, RewardFunctions, score_program
from rlhf_jax.rollout.experience import sampler_gap
from rlhf_jax.rollout.group_experience import make_group_experience
from rlhf_jax.rollout.scoring import score_rollout
from rlhf_jax.run.devices import make_mesh, put_batch
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start


def make_grpo_programs(
    config: GRPOConfig,
    models: PolicyModels,
    optimizers: ActorCritic,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    mesh: Mesh | None = None,
    state_sharding: TrainState | None = None,
) -> GRPOPrograms:
    """Sampling, scoring and updating as the configuration asks for them.

    Args:
        config: of the run.
        models: how to call them.
        optimizers: of the actor, and none of a critic.
        stop_ids: tokens that end an answer.
        pad_id: written after the end of an answer.
        mesh: over which answers are spread; None: one device.
        state_sharding: `NamedSharding`s in the shape of the state; None: one device.
    """
    spread = None if mesh is None else NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    sampler = partial(
        make_sampler,
        models.policy,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        # As replaced rows are placed: with another, what follows compiles twice.
        sharding=spread,
    )
    update = make_update(
        critic_free_objective(
            models.policy.token_logprobs,
            temperature=config.temperature,
            policy_loss=config.policy_loss,
            kl=config.kl,
            num_microbatches=config.microbatches,
        ),
        optimizers,
        num_epochs=config.epochs,
        num_minibatches=config.minibatches,
        num_microbatches=config.microbatches,
        max_kl=config.max_update_kl,
        refresh_every=config.refresh_every,
        assemble=None if models.lora is None else models.assemble,
        state_sharding=state_sharding,
    )
    return GRPOPrograms(
        answering=lambda state: models.actor(_answering(state)),
        sample=sampler(temperature=config.temperature),
        greedy=sampler(temperature=0) if config.groups.baseline == "greedy" else None,
        score=score_program(models, stop_ids=stop_ids, cut=True),
        signal=jax.jit(partial(_has_signal, config=config)),
        replace=jax.jit(_replace_rows, out_shardings=spread),
        experience_of=_experience_program(config, models),
        update=update,
    )


def grpo_step(
    state: TrainState,
    batches: Callable[[int], PromptBatch],
    config: GRPOConfig,
    models: PolicyModels,
    programs: GRPOPrograms,
    reward_of: RewardFn,
    put: Put,
) -> tuple[TrainState, Carried, dict[str, float]]:
    """One update: groups of answers, rewards, advantages, epochs.

    Args:
        state: given up to the update.
        batches: the prompts of a round of sampling, from 0; all of one number.
        config: of the run.
        models: how to call them.
        programs: compiled.
        reward_of: rewards of answers.
        put: places a batch on the devices.

    Returns:
        The new state, what else the next update starts from (the state keeps the old
        until the update is known to be sound), and metrics on the host.
    """
    began = time.perf_counter()
    judged, batch, metrics = sample_groups(
        state, batches, config, programs, reward_of, put
    )
    greedy = None
    if programs.greedy is not None:
        greedy, of_greedy = _greedy_answers(
            state, batch, config, programs, reward_of, put
        )
        for name, value in of_greedy.items():
            metrics[name] = metrics.get(name, 0.0) + value
    rolled_out = time.perf_counter()
    experience, carried, scored = programs.experience_of(
        state, models.frozen, models.reference, judged, greedy
    )
    state, updated = programs.update(state, experience, models.frozen)
    # Means over all that was sampled take the place of those over what was kept.
    metrics = jax.device_get(scored | updated) | metrics
    seconds = time.perf_counter() - began
    metrics |= {
        "time/step_seconds": seconds,
        "time/rollout_seconds": rolled_out - began - metrics["time/reward_seconds"],
        "time/tokens_per_second": metrics["rollout/tokens"] / seconds,
    }
    return state, carried, metrics


def _experience_program(config: GRPOConfig, models: PolicyModels) -> ExperienceFn:
    """Old and reference log-probabilities, advantages and the next β, as one program.

    Returns:
        `(state, frozen, reference, judged, greedy) -> (experience, carried, metrics)`.
    """
    recompute = recomputes_logprobs(config)

    def experience_of(
        state: TrainState,
        frozen: ActorCritic,
        reference: Params | None,
        judged: Judged,
        greedy: Judged | None,
    ) -> tuple[Experience, Carried, dict[str, Array]]:
        answering = models.assemble(_answering(state), frozen.actor)
        scored = score_rollout(
            answering if recompute else None,
            None,
            reference,
            judged.scores,
            judged.rollout,
            token_logprobs_fn=models.policy.token_logprobs,
            values_fn=None,
            temperature=config.temperature,
        )
        baseline = None
        if greedy is not None:
            each = jax.tree.map(
                lambda x: jnp.repeat(x, config.group_size, axis=0), greedy
            )
            baseline = each.rollout, each.scores
        experience, metrics = make_group_experience(
            scored,
            group_size=config.group_size,
            kl_coef=state.kl_coef,
            kl=config.kl,
            scores=config.scores,
            groups=config.groups,
            policy_loss=config.policy_loss,
            greedy=baseline,
        )
        if recompute:
            metrics |= sampler_gap(scored)
        kl_coef = next_kl_coef(config, state.kl_coef, metrics)
        return experience, {"kl_coef": kl_coef}, metrics

    return jax.jit(experience_of)


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
    tokenization = Tokenization.load(config.policy)
    data = read_prompt_data(config, tokenization, stage="grpo")
    with RewardFunctions(config) as functions:
        functions.probe(data)
        return _train(config, tokenization, data, functions)


def _train(
    config: GRPOConfig,
    tokenization: Tokenization,
    data: PromptData,
    functions: RewardFunctions,
) -> RunDirectory:
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    prompts_of = _prompt_order(config, data)

    # ---- models ----
    models, actor = load_policy_models(
        config, tokenization, Networks(config, mesh), prompt_width=data.width
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
        stop_ids=tokenization.stop_ids(config.stop),
        pad_id=tokenization.pad_id,
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
        tokenization=tokenization,
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
