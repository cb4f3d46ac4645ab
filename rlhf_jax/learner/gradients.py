"""Gradients of a batch, with or without microbatches, and the optimizer step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.types import Array, Params

Batch = Any  # a pytree whose leaves have a leading batch axis
Metrics = dict[str, Array]
Objective = Callable[..., tuple[Array, Metrics]]
"""`(params, batch, divisor) -> (loss, metrics)`, scalars that sum over microbatches.

`divisor` is the number of tokens, pairs or other items that the objective averages over
(an array, or a record of several), counted over the *whole* batch: then the losses,
metrics and gradients of microbatches of any size sum to those of the batch.

A metric whose name ends in `loss` is a loss term: if the loss, a loss term or a
gradient norm is not finite, the optimizer step is skipped. Other metrics are only
logged. They may overflow, as the mean ratio does long before a clipped loss, without
any effect.
"""
Assemble = Callable[..., Params]
"""`(params, frozen, key=None) -> params`: combines trainable and frozen parameters of
the network. The key is for randomness in training, such as dropout."""


def on_trainable(
    objective: Objective,
    assemble: Assemble | None,
    frozen: Params | None,
    *,
    objective_key: bool = False,
) -> Callable[..., tuple[Array, Metrics]]:
    """Converts an objective of full parameters to one of the trainable parameters.

    Args:
        objective: of full parameters.
        assemble: combines both trees; None: all parameters are trainable.
        frozen: the frozen parameters.
        objective_key: pass the key to the objective as its fourth argument, instead of
            to `assemble`.

    Returns:
        `(params, batch, divisor, key=None) -> (loss, metrics)`.
    """

    def of_trained(
        params: Params, batch: Batch, divisor: Any, key: Array | None = None
    ) -> tuple[Array, Metrics]:
        if assemble is not None:
            params = assemble(params, frozen, None if objective_key else key)
        if objective_key:
            return objective(params, batch, divisor, key)
        return objective(params, batch, divisor)

    return of_trained


def accumulate_gradients(
    objective: Callable[..., tuple[Array, Metrics]],
    params: Params,
    batch: Batch,
    divisor: Any,
    *,
    num_microbatches: int,
    key: Array | None = None,
) -> tuple[Array, Metrics, Params]:
    """Loss, metrics and gradients of a batch, accumulated over microbatches.

    Args:
        objective: see `Objective`.
        params: to differentiate.
        batch: leaves `[B, …]`.
        divisor: of the whole batch.
        num_microbatches: a divisor of B.
        key: split over microbatches and passed to the objective as a fourth argument;
            None: the objective takes three arguments.

    Returns:
        The result for the whole batch, with gradients in the dtypes of `params`; the
        sum over microbatches is in float32.

    Raises:
        ValueError: when `num_microbatches` does not divide B.
    """
    compute = jax.value_and_grad(objective, has_aux=True)
    keys = () if key is None else (jax.random.split(key, num_microbatches),)
    if num_microbatches == 1:
        (loss, metrics), grads = compute(params, batch, divisor, *(k[0] for k in keys))
        return loss, metrics, grads

    batch_size = jax.tree.leaves(batch)[0].shape[0]
    if num_microbatches < 1 or batch_size % num_microbatches:
        raise ValueError(
            f"num_microbatches={num_microbatches}: expected a divisor of the "
            f"{batch_size} sequences of a minibatch"
        )
    # [B, …] → [B/N, N, …] → [N, B/N, …] keeps every microbatch on all devices.
    split = jax.tree.map(
        lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total, part):
        microbatch, *own_key = part
        (loss, metrics), grads = compute(params, microbatch, divisor, *own_key)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, total, (loss, metrics, grads)), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(compute, params, first, divisor, *(k[0] for k in keys))
    (loss, metrics), grads = shapes
    grads = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, jnp.float32), grads)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, metrics, grads))
    (loss, metrics, grads), _ = jax.lax.scan(add, zeros, (split, *keys))
    # Same dtypes as with one microbatch: optimizer states depend on them.
    return loss, metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
    *,
    accept: Array,
) -> tuple[Params, optax.OptState]:
    """One optimizer step, skipped if `accept` (`[]` bool) is False."""
    updates, stepped_state = optimizer.update(grads, opt_state, params)
    stepped = optax.apply_updates(params, updates)
    keep = lambda new, old: jnp.where(accept, new, old)  # noqa: E731
    return (
        jax.tree.map(keep, stepped, params),
        jax.tree.map(keep, stepped_state, opt_state),
    )
