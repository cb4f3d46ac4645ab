"""The loop of the stages that train one model: `sft` and `reward`."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from rlhf_jax.learner.optimizer import make_optimizer, make_schedule
from rlhf_jax.learner.supervised import SupervisedStep
from rlhf_jax.learner.train_state import ModelState
from rlhf_jax.recipes.session import Session
from rlhf_jax.runtime.batches import Batches
from rlhf_jax.runtime.config import OptimizerConfig
from rlhf_jax.runtime.mesh import put_batch


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
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or None,
    )
    return optimizer, schedule


def fit(
    session: Session,
    state: ModelState,
    *,
    train_step: SupervisedStep,
    batches: Batches,
    evaluate: Callable[[Any], dict[str, float]],
    schedule: optax.Schedule,
    tokens_per_step: int,
    mesh: Mesh,
    shown: Mapping[str, str],
) -> ModelState:
    """Trains to the last step: logs, evaluates and checkpoints on the way.

    Args:
        session: entered.
        state: placed on the mesh; a checkpoint takes its place when resuming.
        train_step: compiled, donates the state.
        batches: by step, from 0.
        evaluate: parameters to held-out metrics.
        schedule: learning rate by optimizer step.
        tokens_per_step: padded tokens of one batch.
        mesh: where batches go.
        shown: metrics for the terminal, by label.

    Returns:
        The state after the last step.
    """
    state = session.restore(state)
    if session.start_step == 0:
        session.log(0, evaluate(state.params), shown=shown)
    for step in session.steps():
        began = time.perf_counter()
        state, metrics = train_step(state, put_batch(mesh, batches[step - 1]))
        metrics = session.check_finite(step, state, jax.device_get(metrics))
        seconds = time.perf_counter() - began
        line = {
            "optim/grad_norm": metrics.pop("grad_norm"),
            "optim/learning_rate": schedule(step - 1),
            "time/step_seconds": seconds,
            "time/tokens_per_second": tokens_per_step / seconds,
        }
        line |= {f"train/{name}": value for name, value in metrics.items()}
        if session.is_eval_step(step):
            line |= evaluate(state.params)
        session.log(step, line, shown=shown)
        session.checkpoint(step, state)
    return state
