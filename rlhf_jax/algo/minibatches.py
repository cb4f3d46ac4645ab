"""Splits a batch into random minibatches without moving data between devices."""

from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array

Tree = TypeVar("Tree")


def split_minibatches(key: Array, experience: Tree, *, num_minibatches: int) -> Tree:
    """A random partition of the sequences of a batch into M equal minibatches.

    Stratified: of every M adjacent sequences, a random one goes to each minibatch, the
    same for all leaves. So each minibatch is sharded as evenly as the batch, and no
    sequence changes its device. A permutation of the whole batch would gather it onto
    every device (meshes with auto axes), or not trace (explicit axes).

    Args:
        key: PRNG key, consumed.
        experience: any pytree of arrays with the same leading axis B.
        num_minibatches: M, a divisor of B. On a sharded batch B / M should be a
            multiple of the number of shards, and with explicit axes it must be.

    Returns:
        The same pytree with leaves `[M, B/M, ...]`; the sharding of B is that of the
        second axis.

    Raises:
        ValueError: when M does not divide B.
        AssertionError: when the leading axes differ.
    """
    leaves = jax.tree.leaves(experience)
    chex.assert_equal_shape_prefix(leaves, 1)
    batch = leaves[0].shape[0]
    if num_minibatches < 1 or batch % num_minibatches:
        raise ValueError(
            f"num_minibatches={num_minibatches}: expected a divisor of the batch, "
            f"which has {batch} sequences"
        )
    strata = (batch // num_minibatches, num_minibatches)
    order = jnp.argsort(jax.random.bits(key, strata), axis=1)  # [B/M, M]

    def split(x: Array) -> Array:
        # `reshape(M, B // M)` would put each minibatch on a subset of the devices.
        blocks = x.reshape(*strata, *x.shape[1:])
        index = order.reshape(*strata, *[1] * (x.ndim - 1))
        return jnp.take_along_axis(blocks, index, axis=1).swapaxes(0, 1)

    return jax.tree.map(split, experience)
