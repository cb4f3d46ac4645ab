"""The loop of the stages that train one model: `sft` and `reward`."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.gradients import Objective
from rlhf_jax.learner.supervised_step import make_supervised_step
from rlhf_jax.learner.train_state import init_model_state
from rlhf_jax.recipes.networks import Network, assembling, place_state, save_trained
from rlhf_jax.recipes.optimizers import optimizer_of
from rlhf_jax.run.devices import put_batch
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedStage:
    """What distinguishes one stage from the other."""

    name: str  # the command
    objective: Objective
    count: Callable[[Any], Array]  # the objective's divisor, from a whole batch
    evaluate: Callable[[Params], dict[str, float]]  # held-out metrics
    batches: Batches  # by step, from 0
    tokens_per_step: int  # of a batch, padding included
    shown: Mapping[str, str]  # label → metric, for the terminal


def train(
    config: SFTConfig | RewardConfig,
    stage: SupervisedStage,
    network: Network,
    params: Params,
    *,
    key: Array,
    tokenization: Tokenization,
    mesh: Mesh,
) -> RunDirectory:
    """Trains to the last step, then writes the model and the report.

    Args:
        config: of the stage, checked.
        stage: what is trained, and on what.
        network: the model.
        params: what is trained of it; given up to the training.
        key: root of the run's randomness.
        tokenization: the tokenizer that is written with the model.
        mesh: where everything lives.

    Raises:
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number, saying how to go on.
    """
    optimizer, schedule = optimizer_of(config.optimizer, total_steps=config.steps)
    state = init_model_state(key, params, optimizer)
    state, sharding = place_state(state, mesh)
    train_step = make_supervised_step(
        stage.objective,
        optimizer,
        count=stage.count,
        num_microbatches=config.microbatches,
        assemble=None if network.lora is None else assembling(network.lora),
        state_sharding=sharding,
    )
    with Session(config, stage=stage.name, total_steps=config.steps) as session:
        state = session.restore(state)
        if session.start_step == 0:
            metrics = stage.evaluate(network.whole(state.params))
            session.log(0, metrics, shown=stage.shown)
        for step in session.steps():
            began = time.perf_counter()
            batch = put_batch(mesh, stage.batches[step - 1])
            state, metrics = train_step(state, batch, network.frozen)
            metrics = session.check_finite(step, jax.device_get(metrics))
            seconds = time.perf_counter() - began
            line = {
                "optim/grad_norm": metrics.pop("grad_norm"),
                "optim/learning_rate": schedule(step - 1),
                "time/step_seconds": seconds,
                "time/tokens_per_second": stage.tokens_per_step / seconds,
            }
            line |= {f"train/{name}": value for name, value in metrics.items()}
            if session.is_eval_step(step):
                line |= stage.evaluate(network.whole(state.params))
            session.log(step, line, shown=stage.shown)
            session.checkpoint(step, state)
    save_trained(session.run, network, config, tokenization, state.params)
    session.report()
    return session.run
