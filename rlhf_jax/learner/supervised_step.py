"""One compiled optimizer step of a stage that trains one model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.learner.finite import TERMS
from rlhf_jax.learner.gradients import (
    Assemble,
    Metrics,
    Objective,
    accumulate_gradients,
    apply_gradients,
    on_trainable,
)
from rlhf_jax.learner.train_state import ModelState

SupervisedStep = Callable[..., tuple[ModelState, Metrics]]


def make_supervised_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    count: Callable[[Any], Array],
    num_microbatches: int = 1,
    assemble: Assemble | None = None,
    state_sharding: ModelState | None = None,
) -> SupervisedStep:
    """Builds `step(state, batch, frozen=None) -> (state, metrics)`.

    The state is donated, frozen parameters are not.

    Args:
        objective: to minimize.
        optimizer: over the model's parameters.
        count: the objective's divisor for a whole batch.
        num_microbatches: a divisor of the batch size.
        assemble: combines trainable and frozen parameters for the objective; gets a new
            key for every step and microbatch. None: all parameters are in the state.
        state_sharding: `NamedSharding`s in the shape of the state; None: one device.

    Returns:
        A compiled function. Metrics are float32 scalars, except `terms/loss` and
        `terms/gradient`, the loss and the gradient norm, `[1]`. If one of them is not
        finite, the state returned is exactly that before the step. The same batch would
        fail again: `pop_nonfinite` raises. Other metrics may overflow without effect.
    """

    def step(
        state: ModelState, batch: Any, frozen: Params | None = None
    ) -> tuple[ModelState, Metrics]:
        key = None if assemble is None else jax.random.fold_in(state.key, state.step)
        loss, metrics, grads = accumulate_gradients(
            on_trainable(objective, assemble, frozen),
            state.params,
            batch,
            count(batch),
            num_microbatches=num_microbatches,
            key=key,
        )
        grad_norm = optax.tree.norm(grads)
        accept = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = apply_gradients(
            optimizer, grads, state.opt_state, state.params, accept=accept
        )
        metrics = metrics | {"grad_norm": grad_norm}
        metrics |= {f"{TERMS}loss": loss[None], f"{TERMS}gradient": grad_norm[None]}
        state = ModelState(
            params=params,
            opt_state=opt_state,
            key=state.key,
            step=state.step + accept,
        )
        return state, metrics

    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None))
