"""Stage 1: a language model learns to imitate texts, or answers to prompts."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Demonstrations, Params
from rlhf_jax.learner.imitation import imitation_losses, imitation_objective
from rlhf_jax.learner.supervised import count_targets
from rlhf_jax.models.callables import policy
from rlhf_jax.recipes.adapted import Network, Networks
from rlhf_jax.recipes.batched import map_batches
from rlhf_jax.recipes.configs import SFTConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import (
    check_fits,
    configured,
    fresh_network,
)
from rlhf_jax.recipes.session import check_start
from rlhf_jax.recipes.sft_data import read_sft_data
from rlhf_jax.recipes.supervised import SupervisedStage, train
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.run_directory import RunDirectory


def run(config: SFTConfig) -> RunDirectory:
    """Trains, and writes the model as a Hugging Face directory.

    Raises:
        ValueError: on bad input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="sft")
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    # ---- text ----
    language, data = read_sft_data(config)

    # ---- model ----
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    network, params = _network(config, language, mesh, init_key)
    module = network.module
    check_fits(module, language, needed=data.width, name="the model", why="max-tokens")
    token_logprobs = policy(module).token_logprobs

    # ---- train ----
    stage = SupervisedStage(
        name="sft",
        objective=imitation_objective(token_logprobs),
        count=count_targets,
        evaluate=make_evaluation(
            jax.jit(imitation_losses(token_logprobs)),
            data.held_out,
            batch_size=config.batch_size,
            mesh=mesh,
        ),
        batches=data.batches,
        tokens_per_step=config.batch_size * data.width,
        shown={"loss": "train/loss", "held-out loss": "eval/loss"},
    )
    return train(
        config, stage, network, params, key=run_key, language=language, mesh=mesh
    )


def make_evaluation(
    losses_fn: Callable[[Params, Demonstrations], Array],
    rows: Demonstrations,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Callable[[Params], dict[str, float]]:
    """Loss and perplexity per target token on held-out rows, by parameters."""
    num_targets = int(np.sum(np.asarray(rows.target_mask)[:, 1:]))

    def evaluate(params: Params) -> dict[str, float]:
        losses = map_batches(
            lambda _, batch: losses_fn(params, batch),
            rows,
            batch_size=batch_size,
            mesh=mesh,
        )
        loss = float(np.sum(losses)) / num_targets
        with np.errstate(over="ignore"):  # beyond a loss of 709 it is infinite
            perplexity = float(np.exp(loss))
        return {"eval/loss": loss, "eval/perplexity": perplexity}

    return evaluate


def _network(
    config: SFTConfig, language: Language, mesh: Mesh, key: Array
) -> tuple[Network, Params]:
    if config.model is not None:
        return Networks(config, mesh).trained(config.model, "lm")
    module, params = fresh_network(
        config.fresh, vocab_size=len(language.tokenizer), key=key
    )
    return Network(module=configured(module, config)), params
