"""From the seed of a command to its key."""

import jax
import numpy as np


def seed_key(seed: int) -> jax.Array:
    """The key of a seed; different for all of them.

    `jax.random.key` uses the lowest 32 bits of a Python integer. Below 2³² both give
    the same key.

    Args:
        seed: from 0 to 2⁶⁴ − 1.
    """
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed))
