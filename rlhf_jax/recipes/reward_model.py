"""Stage 2: a reward model learns from pairs which answer people like better."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.types import Params, Preferences
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.learner.preference import preference_objective
from rlhf_jax.learner.supervised import count_pairs
from rlhf_jax.models.callables import reward_model
from rlhf_jax.recipes.batched import map_batches
from rlhf_jax.recipes.configs import RewardConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, trained_network
from rlhf_jax.recipes.session import check_start
from rlhf_jax.recipes.supervised import SupervisedStage, train
from rlhf_jax.recipes.texts import read_split
from rlhf_jax.runtime.batches import Batches, pad_pairs
from rlhf_jax.runtime.encoding import encode_pairs
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.run_directory import RunDirectory
from rlhf_jax.runtime.text_data import read_pairs


def run(config: RewardConfig) -> RunDirectory:
    """Trains, and writes the model as a Hugging Face sequence classifier.

    Raises:
        ValueError: on bad input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="reward")
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    # ---- text ----
    language = Language.load(config.model)
    batches, held_out, width = _read(config, language)

    # ---- model ----
    head_key, run_key = jax.random.split(jax.random.key(config.seed))
    module, params = trained_network(
        config.model, config, head="reward", mesh=mesh, key=head_key
    )
    check_fits(module, language, needed=width, name="the model", why="max-tokens")
    score_fn = reward_model(module)

    # ---- train ----
    stage = SupervisedStage(
        name="reward",
        objective=preference_objective(
            score_fn,
            label_smoothing=config.label_smoothing,
            center_coef=config.center_coef,
        ),
        count=count_pairs,
        evaluate=make_evaluation(
            score_fn, held_out, batch_size=config.batch_size, mesh=mesh
        ),
        batches=batches,
        tokens_per_step=2 * config.batch_size * width,
        shown={
            "loss": "train/loss",
            "accuracy": "train/accuracy",
            "held-out accuracy": "eval/accuracy",
        },
    )
    return train(
        config, stage, module, params, key=run_key, language=language, mesh=mesh
    )


def make_evaluation(
    score_fn: ScoreFn, pairs: Preferences, *, batch_size: int, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Loss and accuracy on held-out pairs, by parameters."""
    scores_of = jax.jit(
        lambda params, pairs: (
            score_fn(params, pairs.chosen.tokens, pairs.chosen.mask),
            score_fn(params, pairs.rejected.tokens, pairs.rejected.mask),
        )
    )

    def evaluate(params: Params) -> dict[str, float]:
        chosen, rejected = map_batches(
            lambda _, batch: scores_of(params, batch),
            pairs,
            batch_size=batch_size,
            mesh=mesh,
        )
        return {
            "eval/loss": float(np.mean(preference_loss(chosen, rejected))),
            "eval/accuracy": float(np.mean(chosen > rejected)),
            "eval/score_mean": float(np.mean(np.concatenate([chosen, rejected]))),
            "eval/score_std": float(np.std(np.concatenate([chosen, rejected]))),
        }

    return evaluate


def _read(config: RewardConfig, language: Language) -> tuple[Batches, Preferences, int]:
    """Training batches, held-out pairs, and the width of both."""
    read = partial(
        read_pairs, render_chat=language.render, on_unusable=config.unusable_pairs
    )
    training, held_out = read_split(config, read, prompt_of=lambda pair: pair.prompt)
    encode = partial(
        encode_pairs,
        tokenizer=language.tokenizer,
        max_tokens=config.max_tokens,
        eos_id=language.eos_id,
        bos_id=language.bos_id,
        overlong=config.overlong,
    )
    encoded, encoded_held_out = encode(training), encode(held_out)
    width = max(encoded.width, encoded_held_out.width)
    heading(
        f"reward: {len(encoded.rows)} training and {len(encoded_held_out.rows)} "
        f"held-out pairs of at most {width} tokens; too long: {encoded.dropped} "
        f"dropped, {encoded.truncated} truncated",
        quiet=config.quiet,
    )
    collate = partial(pad_pairs, width=width, pad_id=language.pad_id)
    batches = Batches(
        encoded.rows, collate, batch_size=config.batch_size, seed=config.seed
    )
    return batches, collate(encoded_held_out.rows), width
