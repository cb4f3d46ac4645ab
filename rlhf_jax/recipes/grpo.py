"""Stage 3 without a critic: GRPO and related methods.

Start with `train`, the complete algorithm. It calls programs compiled in
`make_programs` from the functions of `rlhf_jax.algo`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.algo.types import Array, Experience, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.interfaces import BATCH_AXES
from rlhf_jax.learner.objectives import critic_free_objective
from rlhf_jax.learner.train_state import (
    ActorCritic,
    TrainState,
    behavior_policy,
    init_train_state,
    step_keys,
)
from rlhf_jax.learner.update import UpdateFn, make_update
from rlhf_jax.recipes.group_sampling import (
    GroupPrograms,
    Groups,
    ScoredResponses,
    has_signal,
    replace_rows,
)
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.optimizers import learning_rates, make_grpo_optimizers
from rlhf_jax.recipes.policy_models import (
    PolicyModels,
    check_models,
    load_policy_models,
)
from rlhf_jax.recipes.policy_run import PolicyRun, next_kl_coef, recomputes_logprobs
from rlhf_jax.recipes.prompt_batches import PromptBatch, prompt_order, read_prompt_data
from rlhf_jax.recipes.responses import Sampler, make_sampler
from rlhf_jax.recipes.scorer import (
    RewardFunctions,
    RewardModelProgram,
    reward_model_program,
)
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.rollout.group_experience import GroupAdvantageFn, make_group_experience
from rlhf_jax.rollout.sampler_mismatch import sampler_gap
from rlhf_jax.rollout.scoring import score_rollout
from rlhf_jax.run.devices import make_mesh, put_batch
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start
from rlhf_jax.run.stopwatch import Stopwatch

SHOWN = {
    "score": "reward/score_mean",
    "zero variance": "group/no_signal",
    "length": "response/length_mean",
    "held-out score": "eval/score_mean",
    "pass@1": "eval/pass_at_1",
}


def run(config: GRPOConfig) -> RunDirectory:
    """Trains and saves the policy as a Hugging Face directory.

    Raises:
        ValueError: for invalid input, before anything is compiled.
        RewardFunctionError: if a reward function fails.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: if a loss or gradient is not finite.
    """
    # Validate all input before reading weights.
    check_start(config)
    tokenization = Tokenization.load(config.policy)
    data = read_prompt_data(config, tokenization)
    check_models(config, tokenization, prompt_width=data.width)
    prompts_of = prompt_order(config, data)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    with RewardFunctions(config) as functions:  # in separate processes
        functions.probe(data)
        grpo = setup(
            config,
            Networks(config, mesh),
            stop_ids=tokenization.stop_ids(config.stop),
            pad_id=tokenization.pad_id,
        )
        with PolicyRun(
            config,
            models=grpo.models,
            sample=grpo.programs.sample,
            score=grpo.programs.score,
            data=data,
            functions=functions,
            tokenization=tokenization,
            mesh=mesh,
            eval_key=grpo.eval_key,
            shown=SHOWN,
        ) as grpo_run:
            state = train(grpo, grpo_run, prompts_of, mesh)
            grpo_run.save(state)
        grpo_run.report()
    return grpo_run.directory


def train(
    grpo: "GRPOSetup",
    run: PolicyRun,
    prompts_of: Callable[[int, int], PromptBatch],
    mesh: Mesh,
) -> TrainState:
    """The training loop: sample groups, score, compute advantages, update."""
    config, models, programs = grpo.config, grpo.models, grpo.programs
    put = partial(put_batch, mesh)

    state = run.restore(grpo.state)
    run.evaluate_start(state)

    for step in run.steps():
        clock = Stopwatch()
        rates = learning_rates(grpo.schedules, state.opt_state)

        # The behavior policy: the latest, or with `refresh_every` an older one.
        behavior = models.actor(behavior_policy(state))
        rollout_key, _ = step_keys(state)

        # G responses per prompt, one score each. Groups whose scores have zero variance
        # have no signal; `resample` replaces them by groups of further prompts. Reward
        # functions run on the host; if one fails, the state is saved.
        groups = Groups(config, programs.groups)
        keys = jax.random.split(rollout_key, 1 + config.resample)
        for number, key in enumerate(keys):
            batch = prompts_of(step, number).repeat(config.group_size)
            rollout = programs.sample(key, behavior, put(batch.prompts))
            clock.lap("rollout", rollout)
            rewards = run.rewards(state, rollout, batch)
            scored = ScoredResponses(rollout=rollout, scores=put(rewards.scores))
            groups.add(batch, scored, rewards.metrics)
            clock.lap("reward")
            if groups.all_have_signal:
                break

        # ReMax uses the greedy response to each prompt as the baseline.
        greedy = None
        if programs.greedy is not None:
            prompts = groups.prompts()
            # At temperature 0 nothing is drawn: the key is not used.
            rollout = programs.greedy(rollout_key, behavior, put(prompts.prompts))
            clock.lap("rollout", rollout)
            rewards = run.rewards(state, rollout, prompts)
            greedy = ScoredResponses(rollout=rollout, scores=put(rewards.scores))
            groups.count_greedy(greedy, rewards.metrics)
            clock.lap("reward")

        # Reference log-probabilities, and group-relative advantages, the same for every
        # token of a response. An adaptive KL coefficient is carried in the state.
        experience, kl_coef, shaped = programs.experience(
            state, models.frozen, models.reference, groups.scored, greedy
        )
        carried = {"kl_coef": kl_coef}

        # Epochs × minibatches of the clipped loss, as one program. The old state is
        # donated, so only the new one may be used from here on. It is the old one if a
        # loss or gradient is not finite.
        state, updated = programs.update(state, experience, models.frozen, carried)

        # Scores are reported over all that was sampled, not over what was kept.
        metrics = jax.device_get(shaped | updated) | groups.metrics() | rates
        metrics |= clock.metrics(metrics["rollout/tokens"])
        state = run.finish(step, state, metrics, experience, groups.batch)
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOSetup:
    """Initial state and programs; from actual networks, or from shapes for planning."""

    config: GRPOConfig
    models: PolicyModels
    state: TrainState
    schedules: ActorCritic  # the actor's learning rate; None for the critic
    programs: "Programs"
    eval_key: Array  # root of the held-out sampling


def setup(
    config: GRPOConfig,
    networks: Networks,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    advantage_fn: GroupAdvantageFn | None = None,
) -> GRPOSetup:
    """Networks, optimizer, state and programs of a run.

    Args:
        config: validated configuration.
        networks: builds the networks, or their shapes.
        stop_ids: stop tokens.
        pad_id: padding token after the end of a response.
        advantage_fn: compares scores in place of `groups.baseline`; see
            `make_group_experience`.
    """
    models, actor = load_policy_models(config, networks)
    run_key, eval_key = jax.random.split(seed_key(config.seed))
    optimizers, schedules = make_grpo_optimizers(config)
    init = partial(
        init_train_state,
        optimizers=optimizers,
        kl_coef=config.kl.coef,
        old_policy=config.refresh_every > 1,
    )
    params = ActorCritic(actor=actor, critic={})
    state, sharding = networks.place(networks.make(init, run_key, params))
    return GRPOSetup(
        config=config,
        models=models,
        state=state,
        schedules=schedules,
        programs=make_programs(
            config,
            models,
            optimizers,
            stop_ids=stop_ids,
            pad_id=pad_id,
            advantage_fn=advantage_fn,
            mesh=networks.mesh,
            state_sharding=sharding,
        ),
        eval_key=eval_key,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled programs of an update."""

    sample: Sampler
    greedy: Sampler | None  # greedy responses, if they are the baseline
    score: RewardModelProgram
    groups: GroupPrograms
    experience: Callable[..., tuple[Experience, Array, dict[str, Array]]]
    """see `grpo_experience`"""
    update: UpdateFn


def make_programs(
    config: GRPOConfig,
    models: PolicyModels,
    optimizers: ActorCritic,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    advantage_fn: GroupAdvantageFn | None = None,
    mesh: Mesh | None = None,
    state_sharding: TrainState | None = None,
) -> Programs:
    """Sampling, scoring and update programs for a configuration.

    Args:
        config: configuration of the run.
        models: the networks' functions.
        optimizers: of the actor; None for the critic.
        stop_ids: stop tokens.
        pad_id: padding token after the end of a response.
        advantage_fn: compares scores in place of `groups.baseline`; see
            `make_group_experience`.
        mesh: mesh to shard responses over; None: one device.
        state_sharding: `NamedSharding`s with the structure of the state; None: one
            device.
    """
    spread = None if mesh is None else NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    sampler = partial(
        make_sampler,
        models.policy,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        # The sharding of replaced rows; with another, later programs compile twice.
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
        undo=config.undo_updates,
        assemble=None if models.lora is None else models.assemble,
        state_sharding=state_sharding,
    )
    experience = partial(
        grpo_experience, config=config, models=models, advantage_fn=advantage_fn
    )
    return Programs(
        sample=sampler(temperature=config.temperature),
        greedy=sampler(temperature=0) if config.groups.baseline == "greedy" else None,
        score=reward_model_program(models, stop_ids=stop_ids, cut=True),
        groups=GroupPrograms(
            signal=jax.jit(partial(has_signal, config=config)),
            replace=jax.jit(replace_rows, out_shardings=spread),
        ),
        experience=jax.jit(experience),
        update=update,
    )


def grpo_experience(
    state: TrainState,
    frozen: ActorCritic,
    reference: Params | None,
    responses: ScoredResponses,
    greedy: ScoredResponses | None,
    *,
    config: GRPOConfig,
    models: PolicyModels,
    advantage_fn: GroupAdvantageFn | None = None,
) -> tuple[Experience, Array, dict[str, Array]]:
    """From scores per response to advantages per token.

    Args:
        state: actor parameters and β.
        frozen: base parameters of its adapters.
        reference: parameters, or None without a KL.
        responses: responses, with contiguous groups.
        greedy: the greedy response to each prompt, if it is the baseline.
        config: configuration of the run.
        models: the networks' functions.
        advantage_fn: as in `setup`.

    Returns:
        The experience, the next β, and metrics.
    """
    recompute = recomputes_logprobs(config)
    behavior = models.assemble(behavior_policy(state), frozen.actor)
    scored = score_rollout(
        behavior if recompute else None,
        None,
        reference,
        responses.scores,
        responses.rollout,
        token_logprobs_fn=models.policy.token_logprobs,
        values_fn=None,
        temperature=config.temperature,
    )
    baseline = None
    if greedy is not None:
        each = jax.tree.map(lambda x: jnp.repeat(x, config.group_size, axis=0), greedy)
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
        advantage_fn=advantage_fn,
    )
    if recompute:
        metrics |= sampler_gap(scored)
    return experience, next_kl_coef(config, state.kl_coef, metrics), metrics
