"""Stage 3: PPO against a reward model, with a KL penalty to the reference."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.kl import adapt_kl_coef
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
from rlhf_jax.recipes.networks import (
    place_state,
)
from rlhf_jax.recipes.session import Session, check_start
from rlhf_jax.recipes.supervised import optimizer_of
from rlhf_jax.recipes.texts import read_split
from rlhf_jax.rollout.experience import make_experience
from rlhf_jax.rollout.scoring import score_rollout
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
    optimizers, schedules = _optimizers(config)
    run_key, eval_key = jax.random.split(jax.random.key(config.seed))
    state = init_train_state(run_key, params, optimizers, kl_coef=config.kl.coef)
    state, sharding = place_state(state, mesh)

    # ---- three programs ----
    sample = make_sampler(
        models.policy,
        max_new_tokens=config.max_new_tokens,
        stop_ids=language.stop_ids(config.stop),
        temperature=config.temperature,
        pad_id=language.pad_id,
    )
    experience_of = make_experience_program(config, models)
    update = make_update(
        ppo_objective(
            token_logprobs_fn=models.policy.token_logprobs,
            values_fn=models.values_fn,
            temperature=config.temperature,
            clip_eps=config.clip_eps,
            value_clip_eps=config.value_clip_eps,
            entropy_coef=config.entropy_coef,
        ),
        optimizers,
        num_epochs=config.epochs,
        num_minibatches=config.minibatches,
        num_microbatches=config.microbatches,
        state_sharding=sharding,
    )

    # ---- train ----
    with Session(config, stage="ppo", total_steps=config.updates) as session:
        state = session.restore(state)
        evaluate = _evaluation(config, session, language, models, sample, mesh)
        if session.start_step == 0:
            session.log(0, evaluate(0, eval_key, state, held_out), shown=SHOWN)
        for step in session.steps():
            prompts = put_batch(mesh, batches[step - 1])
            state, kl_coef, metrics = ppo_step(
                state, prompts, models, sample, experience_of, update
            )
            metrics = session.check_finite(step, state, metrics)
            state = dataclasses.replace(state, kl_coef=kl_coef)
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


ExperienceFn = Callable[
    [TrainState, Params, Params, Rollout], tuple[Experience, Array, dict[str, Array]]
]


def make_experience_program(config: PPOConfig, models: FourModels) -> ExperienceFn:
    """Scoring, shaping, advantages and the next KL coefficient as one program.

    Returns:
        `(state, reference, reward, rollout) -> (experience, kl_coef, metrics)`.
    """

    def experience_of(
        state: TrainState, reference: Params, reward: Params, rollout: Rollout
    ) -> tuple[Experience, Array, dict[str, Array]]:
        recompute = config.old_logprobs == "recomputed"
        if config.old_logprobs == "auto":
            exact = config.dtype == "float32" and jax.default_backend() == "cpu"
            recompute = not exact
        scored = score_rollout(
            state.params.actor if recompute else None,
            state.params.critic,
            reference,
            reward,
            rollout,
            token_logprobs_fn=models.policy.token_logprobs,
            values_fn=models.values_fn,
            score_fn=models.score_fn,
            temperature=config.temperature,
        )
        experience, metrics = make_experience(
            scored,
            kl_coef=state.kl_coef,
            kl_estimator=config.kl.estimator,
            gamma=config.gamma,
            lam=config.lam,
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_mode=config.missing_eos_mode,
            whiten_advantages=config.whiten_advantages,
        )
        kl_coef = state.kl_coef
        if config.kl.target is not None:
            kl_coef = adapt_kl_coef(
                kl_coef,
                metrics["kl/sequence"],
                target_kl=config.kl.target,
                horizon=config.kl.horizon,
                num_episodes=config.batch_size,
            )
        return experience, kl_coef, metrics

    return jax.jit(experience_of)


def ppo_step(
    state: TrainState,
    prompts: Prompts,
    models: FourModels,
    sample: Sampler,
    experience_of: ExperienceFn,
    update: UpdateFn,
) -> tuple[TrainState, Array, dict[str, float]]:
    """One PPO update: rollout, scoring, epochs.

    Returns:
        The new state, the KL coefficient for the next update (the state keeps the old
        one until the update is known to be sound), and metrics on the host.
    """
    began = time.perf_counter()
    rollout_key, _ = step_keys(state)
    rollout = jax.block_until_ready(sample(rollout_key, state.params.actor, prompts))
    rolled_out = time.perf_counter()
    experience, kl_coef, scored = experience_of(
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
    return state, kl_coef, metrics


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
        assert answers.scores is not None and answers.kl is not None
        rows = zip(
            language.decode_prompts(prompts),
            answers.texts(language),
            answers.scores,
            answers.kl,
            strict=True,
        )
        session.log_samples(
            step,
            [
                {"prompt": prompt, "response": text, "score": score, "kl": kl}
                for prompt, text, score, kl in itertools.islice(
                    rows, NUM_LOGGED_SAMPLES
                )
            ],
        )
        return {f"eval/{name}": value for name, value in answers.metrics().items()}

    return evaluate
