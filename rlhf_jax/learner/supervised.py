"""One optimizer step of a stage that trains one model, as one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.types import Array, Demonstrations, Preferences, Rankings
from rlhf_jax.learner.finite import first_nonfinite
from rlhf_jax.learner.gradients import (
    Metrics,
    Objective,
    accumulate_gradients,
    apply_gradients,
)
from rlhf_jax.learner.train_state import ModelState

SupervisedStep = Callable[[ModelState, Any], tuple[ModelState, Metrics]]


def count_targets(batch: Demonstrations) -> Array:
    """Divisor of `imitation_objective`: target tokens, at least 1."""
    return jnp.maximum(jnp.sum(batch.target_mask[:, 1:]), 1).astype(jnp.float32)


def count_pairs(batch: Preferences) -> Array:
    """Divisor of `preference_objective`."""
    return jnp.asarray(batch.chosen.tokens.shape[0], jnp.float32)


def count_rankings(batch: Rankings) -> Array:
    """Divisor of `ranking_objective`."""
    return jnp.asarray(batch.grades.shape[0], jnp.float32)


def make_supervised_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    count: Callable[[Any], Array],
    num_microbatches: int = 1,
    state_sharding: ModelState | None = None,
) -> SupervisedStep:
    """Builds `step(state, batch) -> (state, metrics)`; the state is donated.

    Args:
        objective: what is minimised.
        optimizer: over the model's parameters.
        count: the objective's divisor, from a whole batch.
        num_microbatches: a divisor of the batch size.
        state_sharding: `NamedSharding`s in the shape of the state; None: one device.

    Returns:
        A compiled function. Where loss or gradient is not finite it leaves the state
        as it was and reports which in `first_nonfinite/…`.
    """

    def step(state: ModelState, batch: Any) -> tuple[ModelState, Metrics]:
        loss, metrics, grads = accumulate_gradients(
            objective,
            state.params,
            batch,
            count(batch),
            num_microbatches=num_microbatches,
        )
        grad_norm = optax.tree.norm(grads)
        accept = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = apply_gradients(
            optimizer, grads, state.opt_state, state.params, accept=accept
        )
        metrics = metrics | {"grad_norm": grad_norm}
        metrics |= first_nonfinite({"loss": loss[None], "gradient": grad_norm[None]})
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
