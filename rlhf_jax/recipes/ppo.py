"""Stage 3: PPO against a reward model, with a KL penalty to the reference."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.kl import adapt_kl_coef
from rlhf_jax.algo.score_moments import (
    ScoreMoments,
    init_score_moments,
    update_score_moments,
)
from rlhf_jax.algo.types import Array, Experience, Params, Prompts, Rollout
from rlhf_jax.learner.objectives import ppo_objective
from rlhf_jax.learner.train_state import (
    ActorCritic,
    TrainState,
    init_train_state,
    step_keys,
)
from rlhf_jax.learner.update import UpdateFn, make_update
from rlhf_jax.models.hf_weights import save_pretrained
from rlhf_jax.recipes.answers import Examiner, Sampler, make_sampler
from rlhf_jax.recipes.configs import PPOConfig
from rlhf_jax.recipes.four_models import FourModels, load_four_models
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.session import Session, check_start
from rlhf_jax.recipes.supervised import optimizer_of
from rlhf_jax.recipes.texts import read_split
from rlhf_jax.rollout.experience import make_experience, whiten_minibatch
from rlhf_jax.rollout.scoring import mark_stops, score_rollout
from rlhf_jax.runtime.batches import Batches, pad_prompts
from rlhf_jax.runtime.encoding import encode_prompts
from rlhf_jax.runtime.mesh import make_mesh, put_batch
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.run_directory import RunDirectory
from rlhf_jax.runtime.text_data import Columns, read_prompts

SHOWN = {
    "score": "reward/score_mean",
    "KL": "kl/sequence",
    "length": "response/length_mean",
    "held-out score": "eval/score_mean",
}
NUM_LOGGED_SAMPLES = 8
NUM_NORMALIZATION_BATCHES = 4


def run(config: PPOConfig) -> RunDirectory:
    """Trains, and writes the policy as a Hugging Face directory.

    Raises:
        ValueError: on bad input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="ppo")
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    # ---- text ----
    language = Language.load(config.policy)
    batches, held_out = _read(config, language)

    # ---- four models ----
    models, params = load_four_models(
        config, language, mesh, prompt_width=held_out.tokens.shape[1]
    )
    run_key, eval_key, moments_key = jax.random.split(jax.random.key(config.seed), 3)
    optimizers, schedules = _optimizers(config)
    state = init_train_state(
        run_key,
        params,
        optimizers,
        kl_coef=config.kl.coef,
        slow_critic=config.advantages.slow_critic_decay is not None,
    )
    state, sharding = place_state(state, mesh)

    # ---- three programs ----
    stop_ids = language.stop_ids(config.stop)
    sample = make_sampler(
        models.policy,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids if config.after_stop == "cut" else (),
        temperature=config.temperature,
        pad_id=language.pad_id,
    )
    experience_of = make_experience_program(config, models, stop_ids)
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
        prepare=partial(whiten_minibatch, options=config.advantages)
        if config.advantages.whiten == "minibatch"
        else None,
        max_kl=config.max_update_kl,
        critic_warmup=config.critic_warmup,
        slow_critic_decay=config.advantages.slow_critic_decay,
        state_sharding=sharding,
    )

    # ---- train ----
    with Session(config, stage="ppo", total_steps=config.updates) as session:
        state = session.restore(state)
        if session.start_step == 0 and config.scores.normalization == "reference":
            moments = _reference_moments(moments_key, batches, models, sample, mesh)
            state = dataclasses.replace(state, score_moments=moments)
        evaluate = _evaluation(config, session, language, models, sample, mesh)
        if session.start_step == 0:
            session.log(0, evaluate(0, eval_key, state, held_out), shown=SHOWN)
        for step in session.steps():
            prompts = put_batch(mesh, batches[step - 1])
            state, carried, metrics = ppo_step(
                state, prompts, models, sample, experience_of, update
            )
            metrics = session.check_finite(step, state, metrics)
            state = dataclasses.replace(state, **carried)
            metrics |= _learning_rates(config, schedules, step)
            if session.is_eval_step(step):
                metrics |= evaluate(step, eval_key, state, held_out)
            session.log(step, metrics, shown=SHOWN)
            session.checkpoint(step, state)
    save_pretrained(
        session.run.model,
        models.module,
        state.params.actor,
        tokenizer=language.tokenizer,
    )
    session.report()
    return session.run


Carried = dict[str, Any]
"""Fields of the state that scoring changes: the KL coefficient, the score moments."""

ExperienceFn = Callable[
    [TrainState, Params | None, Params, Rollout],
    tuple[Experience, Carried, dict[str, Array]],
]


def make_experience_program(
    config: PPOConfig, models: FourModels, stop_ids: Sequence[int]
) -> ExperienceFn:
    """Scoring, shaping, advantages and the next KL coefficient as one program.

    Returns:
        `(state, reference, reward, rollout) -> (experience, carried, metrics)`.
    """
    recompute = config.old_logprobs == "recomputed"
    if config.old_logprobs == "auto":
        exact = config.dtype == "float32" and jax.default_backend() == "cpu"
        recompute = not exact

    def experience_of(
        state: TrainState, reference: Params | None, reward: Params, rollout: Rollout
    ) -> tuple[Experience, Carried, dict[str, Array]]:
        score_mask = None
        if config.after_stop == "keep":
            rollout, score_mask = mark_stops(rollout, stop_ids)
        scored = score_rollout(
            state.params.actor if recompute else None,
            models.critic_of(state.params),
            reference,
            reward,
            rollout,
            token_logprobs_fn=models.policy.token_logprobs,
            values_fn=models.values_fn,
            score_fn=models.score_fn,
            temperature=config.temperature,
            score_mask=score_mask,
            slow_critic=state.slow_critic,
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
        kl_coef = state.kl_coef
        if config.kl.target is not None:
            unit = {"sequence-sum": "kl/sequence", "token-mean": "kl/token"}
            kl_coef = adapt_kl_coef(
                kl_coef,
                metrics[unit[config.kl.unit]],
                target_kl=config.kl.target,
                horizon=config.kl.horizon,
                num_episodes=config.batch_size,
            )
        return experience, {"kl_coef": kl_coef, "score_moments": moments}, metrics

    return jax.jit(experience_of)


def ppo_step(
    state: TrainState,
    prompts: Prompts,
    models: FourModels,
    sample: Sampler,
    experience_of: ExperienceFn,
    update: UpdateFn,
) -> tuple[TrainState, Carried, dict[str, float]]:
    """One PPO update: rollout, scoring, epochs.

    Returns:
        The new state, what else the next update starts from (the state keeps the old
        until the update is known to be sound), and metrics on the host.
    """
    began = time.perf_counter()
    rollout_key, _ = step_keys(state)
    rollout = jax.block_until_ready(sample(rollout_key, state.params.actor, prompts))
    rolled_out = time.perf_counter()
    experience, carried, scored = experience_of(
        state, models.reference, models.reward, rollout
    )
    state, updated = update(state, experience)
    metrics = jax.device_get(scored | updated)
    seconds = time.perf_counter() - began
    num_tokens = float(metrics["response/length_mean"]) * prompts.lengths.shape[0]
    metrics |= {
        "time/step_seconds": seconds,
        "time/rollout_seconds": rolled_out - began,
        "time/tokens_per_second": num_tokens / seconds,
    }
    return state, carried, metrics


def _reference_moments(
    key: Array, batches: Batches, models: FourModels, sample: Sampler, mesh: Mesh
) -> ScoreMoments:
    """Of the scores of the reference's answers to the first batches of prompts."""
    moments = init_score_moments()
    for number in range(NUM_NORMALIZATION_BATCHES):
        prompts = put_batch(mesh, batches[number])
        batch_key = jax.random.fold_in(key, number)
        rollout = sample(batch_key, models.reference, prompts)
        scores = models.score_fn(models.reward, rollout.tokens, rollout.sequence_mask)
        moments = update_score_moments(moments, scores)
    return moments


def _read(config: PPOConfig, language: Language) -> tuple[Batches, Prompts]:
    """Training batches and held-out prompts, all of one width."""
    read = partial(
        read_prompts,
        columns=Columns(prompt=config.prompt_column),
        render_chat=language.render,
    )
    train, held_out = read_split(config, read, prompt_of=lambda prompt: prompt)
    encode = partial(
        encode_prompts,
        tokenizer=language.tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        bos_id=language.bos_id,
        overlong=config.overlong,
    )
    encoded = encode(train)
    encoded_held_out = encode(held_out[: config.eval_prompts])
    width = max(encoded.width, encoded_held_out.width)
    heading(
        f"ppo: {len(encoded.rows)} training and {len(encoded_held_out.rows)} held-out "
        f"prompts of at most {width} tokens; too long: {encoded.dropped} dropped, "
        f"{encoded.truncated} truncated",
        quiet=config.quiet,
    )
    collate = partial(pad_prompts, width=width, pad_id=language.pad_id)
    batches = Batches(
        encoded.rows, collate, batch_size=config.batch_size, seed=config.seed
    )
    return batches, collate(encoded_held_out.rows)


def _optimizers(config: PPOConfig) -> tuple[ActorCritic, ActorCritic]:
    """Optimizers and learning-rate schedules of actor and critic."""
    total_steps = config.updates * config.epochs * config.minibatches
    actor, actor_rate = optimizer_of(config.actor_optimizer, total_steps=total_steps)
    critic, critic_rate = optimizer_of(config.critic_optimizer, total_steps=total_steps)
    return (
        ActorCritic(actor=actor, critic=critic),
        ActorCritic(actor=actor_rate, critic=critic_rate),
    )


def _learning_rates(
    config: PPOConfig, schedules: ActorCritic, step: int
) -> dict[str, Any]:
    """Rates at the first optimizer step of an update."""
    first = (step - 1) * config.epochs * config.minibatches
    return {
        "optim/actor_learning_rate": schedules.actor(first),
        "optim/critic_learning_rate": schedules.critic(first),
    }


def _evaluation(
    config: PPOConfig,
    session: Session,
    language: Language,
    models: FourModels,
    sample: Sampler,
    mesh: Mesh,
) -> Callable[[int, Array, TrainState, Prompts], dict[str, float]]:
    """Answers held-out prompts, logs a few of them, returns their metrics."""
    examiner = Examiner(
        sample,
        policy=models.policy,
        score_fn=models.score_fn,
        temperature=config.temperature,
        batch_size=config.batch_size,
        mesh=mesh,
    )

    def evaluate(
        step: int, key: Array, state: TrainState, prompts: Prompts
    ) -> dict[str, float]:
        answers = examiner.answers(
            jax.random.fold_in(key, step),
            state.params.actor,
            prompts,
            reference=models.reference,
            reward=models.reward,
        )
        assert answers.scores is not None
        columns = {
            "prompt": language.decode_prompts(prompts),
            "response": answers.texts(language),
            "score": answers.scores,
        }
        if answers.kl is not None:
            columns["kl"] = answers.kl
        rows = zip(*columns.values(), strict=True)
        session.log_samples(
            step,
            [
                dict(zip(columns, row, strict=True))
                for row in itertools.islice(rows, NUM_LOGGED_SAMPLES)
            ],
        )
        return {f"eval/{name}": value for name, value in answers.metrics().items()}

    return evaluate
