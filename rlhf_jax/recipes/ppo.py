"""Stage 3: PPO against a reward model, with a KL penalty to the reference."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Prompts
from rlhf_jax.learner.train_state import (
    TrainState,
    init_train_state,
)
from rlhf_jax.models.hf_weights import save_pretrained
from rlhf_jax.recipes.answers import Examiner, Sampler
from rlhf_jax.recipes.configs import PPOConfig
from rlhf_jax.recipes.four_models import FourModels, load_four_models
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.ppo_programs import (
    learning_rates,
    make_optimizers,
    make_programs,
    ppo_step,
    reference_moments,
)
from rlhf_jax.recipes.session import Session, check_start
from rlhf_jax.recipes.texts import read_split
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
    with Session(config, stage="ppo", total_steps=config.updates) as session:
        state = session.restore(state)
        if session.start_step == 0 and config.scores.normalization == "reference":
            moments = reference_moments(
                moments_key, batches, models, programs, mesh, sharding.score_moments
            )
            state = dataclasses.replace(state, score_moments=moments)
        evaluate = _evaluation(config, session, language, models, programs.answer, mesh)
        if session.start_step == 0:
            session.log(0, evaluate(0, eval_key, state, held_out), shown=SHOWN)
        for step in session.steps():
            prompts = put_batch(mesh, batches[step - 1])
            rates = learning_rates(schedules, state.opt_state)
            state, carried, metrics = ppo_step(state, prompts, models, programs)
            metrics = session.check_finite(step, state, metrics)
            state = dataclasses.replace(state, **carried)
            metrics |= rates
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
