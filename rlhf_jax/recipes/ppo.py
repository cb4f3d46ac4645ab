"""Stage 3: PPO against a reward, with a KL penalty to the reference.

Start with `train`, the complete algorithm. It calls programs compiled in
`make_programs` from the functions of `rlhf_jax.algo`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.options import check
from rlhf_jax.algo.scores import ScoreMoments, init_score_moments, update_score_moments
from rlhf_jax.algo.types import Array, Experience, Params, Rollout
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.objectives import ppo_objective
from rlhf_jax.learner.train_state import (
    ActorCritic,
    TrainState,
    init_train_state,
    step_keys,
)
from rlhf_jax.learner.update import UpdateFn, make_update
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.optimizers import learning_rates, make_ppo_optimizers
from rlhf_jax.recipes.policy_models import FourModels, check_models, load_four_models
from rlhf_jax.recipes.policy_run import PolicyRun, next_kl_coef, recomputes_logprobs
from rlhf_jax.recipes.prompt_batches import PromptData, read_prompt_data
from rlhf_jax.recipes.responses import Sampler, make_sampler
from rlhf_jax.recipes.scorer import (
    RewardFunctions,
    RewardModelProgram,
    reward_model_program,
)
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.rollout.experience import AdvantageFn, make_experience, whiten_minibatch
from rlhf_jax.rollout.sampler_mismatch import sampler_gap
from rlhf_jax.rollout.scoring import mark_stops, score_rollout
from rlhf_jax.run.devices import make_mesh, put_batch
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start
from rlhf_jax.run.stopwatch import Stopwatch

NUM_NORMALIZATION_BATCHES = 4

SHOWN = {
    "score": "reward/score_mean",
    "KL": "kl/sequence",
    "length": "response/length_mean",
    "held-out score": "eval/score_mean",
}


def run(config: PPOConfig) -> RunDirectory:
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
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    with RewardFunctions(config) as functions:  # in separate processes
        functions.probe(data)
        ppo = setup(
            config,
            Networks(config, mesh),
            stop_ids=tokenization.stop_ids(config.stop),
            pad_id=tokenization.pad_id,
        )
        with PolicyRun(
            config,
            models=ppo.models,
            sample=ppo.programs.sample_to_stop,
            score=ppo.programs.score,
            data=data,
            functions=functions,
            tokenization=tokenization,
            mesh=mesh,
            eval_key=ppo.eval_key,
            shown=SHOWN,
        ) as ppo_run:
            state = train(ppo, ppo_run, data, mesh)
            ppo_run.save(state)
        ppo_run.report()
    return ppo_run.directory


def train(ppo: "PPOSetup", run: PolicyRun, data: PromptData, mesh: Mesh) -> TrainState:
    """The training loop: sample, score, estimate advantages, update."""
    config, models, programs = ppo.config, ppo.models, ppo.programs
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)

    state = run.restore(ppo.state)
    if run.is_fresh and config.scores.normalization == "reference":
        moments = reference_moments(ppo, run, state, data, mesh)
        state = dataclasses.replace(state, score_moments=moments)
    run.evaluate_start(state)

    for step in run.steps():
        clock = Stopwatch()
        rates = learning_rates(ppo.schedules, state.opt_state)

        # Sample responses to a batch of prompts. The log-probability of each token is
        # kept as the denominator of PPO's ratio.
        batch = batches[step - 1]
        rollout_key, _ = step_keys(state)
        actor = models.actor(state.params.actor)
        rollout = programs.sample(rollout_key, actor, put_batch(mesh, batch.prompts))
        clock.lap("rollout", rollout)

        # One score per response, from the reward model, reward functions or both.
        # Functions run on the host; if one fails, the state is saved.
        rewards = run.rewards(state, rollout, batch)
        clock.lap("reward")

        # Reference log-probabilities and values. KL penalty and score become token
        # rewards, and GAE turns those into advantages and value targets. An adaptive KL
        # coefficient and running score moments are carried in the state.
        experience, kl_coef, moments, shaped = programs.experience(
            state, models.frozen, models.reference, rewards.scores, rollout
        )
        carried = {"kl_coef": kl_coef, "score_moments": moments}

        # Epochs × minibatches of the clipped losses, as one program. The old state is
        # donated, so only the new one may be used from here on. It is the old one if a
        # loss or gradient is not finite.
        state, updated = programs.update(state, experience, models.frozen, carried)

        metrics = jax.device_get(shaped | updated) | rewards.metrics | rates
        metrics["rollout/tokens"] = float(jnp.sum(rollout.lengths))
        metrics |= clock.metrics(metrics["rollout/tokens"])
        state = run.finish(step, state, metrics, experience, batch)
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSetup:
    """Initial state and programs; from actual networks, or from shapes for planning."""

    config: PPOConfig
    models: FourModels
    state: TrainState
    schedules: ActorCritic  # learning rates of actor and critic
    programs: "Programs"
    eval_key: Array  # key for held-out sampling
    moments_key: Array  # key for sampling from the reference


def setup(
    config: PPOConfig,
    networks: Networks,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    advantage_fn: AdvantageFn | None = None,
) -> PPOSetup:
    """Networks, optimizers, state and programs of a run.

    Args:
        config: validated configuration.
        networks: builds the networks, or their shapes.
        stop_ids: stop tokens.
        pad_id: padding token after the end of a response.
        advantage_fn: estimates advantages in place of GAE; see
            `make_experience`.
    """
    models, params = load_four_models(config, networks)
    run_key, eval_key, moments_key = jax.random.split(seed_key(config.seed), 3)
    optimizers, schedules = make_ppo_optimizers(config)
    init = partial(
        init_train_state,
        optimizers=optimizers,
        kl_coef=config.kl.coef,
        slow_critic=config.advantages.slow_critic_decay is not None,
    )
    state, sharding = networks.place(networks.make(init, run_key, params))
    return PPOSetup(
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
            state_sharding=sharding,
        ),
        eval_key=eval_key,
        moments_key=moments_key,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled programs of an update."""

    sample: Sampler
    sample_to_stop: Sampler  # cut at the first stop token, also with after_stop=keep
    score: RewardModelProgram
    experience: Callable[..., tuple[Experience, Array, ScoreMoments, dict[str, Array]]]
    """see `ppo_experience`"""
    update: UpdateFn


def make_programs(
    config: PPOConfig,
    models: FourModels,
    optimizers: ActorCritic,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    advantage_fn: AdvantageFn | None = None,
    state_sharding: TrainState | None = None,
) -> Programs:
    """Sampling, scoring and update programs for a configuration.

    Args:
        config: configuration of the run.
        models: functions of the four models.
        optimizers: of actor and critic.
        stop_ids: stop tokens.
        pad_id: padding token after the end of a response.
        advantage_fn: estimates advantages in place of GAE; see
            `make_experience`.
        state_sharding: `NamedSharding`s with the structure of the state; None: one
            device.
    """
    sampler = partial(
        make_sampler,
        models.policy,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        pad_id=pad_id,
    )
    sample = sample_to_stop = sampler(stop_ids=stop_ids)
    if config.after_stop == "keep":
        sample = sampler(stop_ids=())
    whiten = None
    if config.advantages.whiten == "minibatch":
        whiten = partial(whiten_minibatch, options=config.advantages)
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
        prepare=whiten,
        max_kl=config.max_update_kl,
        critic_warmup=config.critic_warmup,
        slow_critic_decay=config.advantages.slow_critic_decay,
        undo=config.undo_updates,
        assemble=None if models.lora is None else models.assemble,
        state_sharding=state_sharding,
    )
    experience = partial(
        ppo_experience,
        config=config,
        models=models,
        stop_ids=stop_ids,
        advantage_fn=advantage_fn,
    )
    cut = config.after_stop == "cut"
    return Programs(
        sample=sample,
        sample_to_stop=sample_to_stop,
        score=reward_model_program(models, stop_ids=stop_ids, cut=cut),
        experience=jax.jit(experience),
        update=update,
    )


def ppo_experience(
    state: TrainState,
    frozen: ActorCritic,
    reference: Params | None,
    scores: Array,
    rollout: Rollout,
    *,
    config: PPOConfig,
    models: FourModels,
    stop_ids: Sequence[int],
    advantage_fn: AdvantageFn | None = None,
) -> tuple[Experience, Array, ScoreMoments, dict[str, Array]]:
    """From scores per response to advantages per token.

    Args:
        state: parameters of actor and critic, β, score moments.
        frozen: base parameters of the adapters of actor and critic.
        reference: parameters, or None without a KL.
        scores: `[B]`, one per response.
        rollout: the responses.
        config: configuration of the run.
        models: functions of the four models.
        stop_ids: stop tokens.
        advantage_fn: as in `setup`.

    Returns:
        The experience, the next β, the next score moments, and metrics.
    """
    recompute = recomputes_logprobs(config)
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
        advantage_fn=advantage_fn,
    )
    if recompute:
        metrics |= sampler_gap(scored)
    return experience, next_kl_coef(config, state.kl_coef, metrics), moments, metrics


def reference_moments(
    ppo: PPOSetup, run: PolicyRun, state: TrainState, data: PromptData, mesh: Mesh
) -> ScoreMoments:
    """Mean and standard deviation of the reference's scores, on some prompt batches.

    Responses end at their stop token: in training with `after_stop="keep"`, the reward
    model does not read what follows it either.

    Raises:
        ValueError: the scores have zero variance.
    """
    config, models = ppo.config, ppo.models
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)
    add = jax.jit(update_score_moments)
    moments = init_score_moments()
    for number in range(NUM_NORMALIZATION_BATCHES):
        batch = batches[number]
        key = jax.random.fold_in(ppo.moments_key, number)
        rollout = ppo.programs.sample_to_stop(
            key, models.reference, put_batch(mesh, batch.prompts)
        )
        moments = add(moments, run.rewards(state, rollout, batch).scores)
    check(
        bool(moments.squares > 0),
        "scores.normalization",
        "reference",
        f"the scores of {int(moments.count)} responses of the reference have zero "
        "variance; use running or none",
    )
    # The sharding that the update returns; another would recompile everything.
    return jax.device_put(
        moments, jax.tree.map(lambda x: x.sharding, state.score_moments)
    )
