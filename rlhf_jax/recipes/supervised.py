"""The loop of the stages that train one model: `sft` and `reward`."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.learner.gradients import Objective
from rlhf_jax.learner.optimizer import make_optimizer, make_schedule
from rlhf_jax.learner.supervised import make_supervised_step
from rlhf_jax.learner.train_state import init_model_state
from rlhf_jax.recipes.adapted import Network, assembling, save_trained
from rlhf_jax.recipes.configs import RewardConfig, SFTConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.session import Session
from rlhf_jax.runtime.batches import Batches
from rlhf_jax.runtime.config import OptimizerConfig
from rlhf_jax.runtime.mesh import put_batch
from rlhf_jax.runtime.run_directory import RunDirectory


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
    language: Language,
    mesh: Mesh,
) -> RunDirectory:
    """Trains to the last step, then writes the model and the report.

    Args:
        config: of the stage, checked.
        stage: what is trained, and on what.
        network: the model.
        params: what is trained of it; given up to the training.
        key: root of the run's randomness.
        language: the tokenizer that is written with the model.
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
    save_trained(session.run, network, config, language, state.params)
    session.report()
    return session.run


def optimizer_of(
    config: OptimizerConfig, *, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer that a configuration describes, and its learning rate by step."""
    schedule = make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        total_steps=total_steps,
        warmup_steps=round(config.warmup_fraction * total_steps),
        end_fraction=config.end_fraction,
    )
    optimizer = make_optimizer(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        form=config.form,
        weight_decay=config.weight_decay,
        decay=config.decay,
        max_grad_norm=config.max_grad_norm or None,
    )
    return optimizer, schedule
