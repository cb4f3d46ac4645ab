"""Stage 2: a reward model learns from judgements which answers people like better."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.ranking import pairwise_ranking_loss, plackett_luce_loss
from rlhf_jax.algo.types import Array, Params, Preferences, Rankings
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.learner.gradients import Objective
from rlhf_jax.learner.preference import preference_objective, ranking_objective
from rlhf_jax.learner.supervised import count_pairs, count_rankings
from rlhf_jax.models.callables import reward_model
from rlhf_jax.recipes.adapted import Networks
from rlhf_jax.recipes.batched import map_batches
from rlhf_jax.recipes.configs import RewardConfig
from rlhf_jax.recipes.feedback import read_feedback
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits
from rlhf_jax.recipes.session import check_start
from rlhf_jax.recipes.supervised import SupervisedStage, train
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.run_directory import RunDirectory


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
    feedback = read_feedback(config, language)

    # ---- model ----
    head_key, run_key = jax.random.split(jax.random.key(config.seed))
    network, params = Networks(config, mesh).trained(
        config.model, "reward", key=head_key
    )
    module = network.module
    width = feedback.width
    check_fits(module, language, needed=width, name="the model", why="max-tokens")
    score_fn = reward_model(module)

    # ---- train ----
    objective, count = _objective(config, score_fn)
    stage = SupervisedStage(
        name="reward",
        objective=objective,
        count=count,
        evaluate=make_evaluation(
            score_fn, feedback.held_out, batch_size=config.batch_size, mesh=mesh
        ),
        batches=feedback.batches,
        tokens_per_step=feedback.num_answers * config.batch_size * width,
        shown={
            "loss": "train/loss",
            "accuracy": "train/accuracy",
            "held-out accuracy": "eval/accuracy",
        },
    )
    return train(
        config, stage, network, params, key=run_key, language=language, mesh=mesh
    )


def make_evaluation(
    score_fn: ScoreFn, pairs: Preferences, *, batch_size: int, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Loss and accuracy on held-out pairs, by parameters.

    The loss is that of Bradley and Terry without margins or label smoothing, whatever
    is trained: so runs on other forms of feedback and other losses compare.
    """
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


def _objective(
    config: RewardConfig, score_fn: ScoreFn
) -> tuple[Objective, Callable[[Any], Array]]:
    """What is minimised, and its divisor."""
    if config.loss == "bradley-terry":
        objective = preference_objective(
            score_fn,
            label_smoothing=config.label_smoothing,
            center_coef=config.center_coef,
        )
        return objective, count_pairs

    def loss_fn(scores: Array, batch: Rankings) -> Array:
        if config.loss == "plackett-luce":
            return plackett_luce_loss(scores, mask=batch.mask)
        return pairwise_ranking_loss(
            scores,
            batch.grades,
            mask=batch.mask,
            margin_step=config.margin_step,
            label_smoothing=config.label_smoothing,
        )

    objective = ranking_objective(score_fn, loss_fn, center_coef=config.center_coef)
    return objective, count_rankings
