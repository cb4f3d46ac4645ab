"""Gradients of a batch, whole or in microbatches, and the step they lead to."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.types import Array, Params

Batch = Any  # a pytree whose leaves lead with the batch axis
Metrics = dict[str, Array]
Objective = Callable[..., tuple[Array, Metrics]]
"""`(params, batch, divisor) -> (loss, metrics)`, scalars that add up over microbatches.

`divisor` is the number of tokens, pairs or whatever the objective averages over (an
array, or a record of several), counted over the *whole* batch: then the losses, metrics
and gradients of its microbatches sum to those of the batch, however unequal they are.

A metric whose name ends in `loss` is a term of the loss: where the loss, one of those
or the norm of a gradient is not finite, no optimizer step is taken. The other metrics
are there to be watched. They may overflow, as the mean ratio does long before a clipped
loss, and decide nothing.
"""
Assemble = Callable[..., Params]
"""`(params, frozen, key=None) -> params` of the whole network: what is trained and what
is not, put together. A key draws what is random in training, such as dropout."""


def on_trainable(
    objective: Objective,
    assemble: Assemble | None,
    frozen: Params | None,
    *,
    objective_key: bool = False,
) -> Callable[..., tuple[Array, Metrics]]:
    """An objective of whole parameters as one of those that are trained.

    Args:
        objective: of whole parameters.
        assemble: puts them together; None: everything is trained.
        frozen: the others.
        objective_key: the key is the objective's, as its fourth argument, and not for
            what is random in putting parameters together.

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
    """Loss, metrics and gradients of a batch, holding one microbatch's activations.

    Args:
        objective: see `Objective`.
        params: differentiated.
        batch: leaves `[B, …]`.
        divisor: of the whole batch.
        num_microbatches: a divisor of B.
        key: split, and a part given to the objective with each microbatch as a fourth
            argument; None: objectives take three.

    Returns:
        What one call on the whole batch would give, gradients in the dtypes of
        `params`; their sum over microbatches is taken in float32.

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
    # [B, …] → [B/N, N, …] → [N, B/N, …] leaves every microbatch on all devices.
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
    # As one microbatch has them: optimizer states take their dtypes from these.
    return loss, metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
    *,
    accept: Array,
) -> tuple[Params, optax.OptState]:
    """One optimizer step, or none where `accept` (`[]` bool) is False."""
    updates, stepped_state = optimizer.update(grads, opt_state, params)
    stepped = optax.apply_updates(params, updates)
    keep = lambda new, old: jnp.where(accept, new, old)  # noqa: E731
    return (
        jax.tree.map(keep, stepped, params),
        jax.tree.map(keep, stepped_state, opt_state),
    )
