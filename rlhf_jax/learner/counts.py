"""What the means of a loss divide by, counted over a whole minibatch."""

import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Experience, record


@record
class Counts:
    """Divisors of the objectives of policies; each at least 1."""

    tokens: Array  # [] float32, real tokens of the actor
    value_tokens: Array  # [] float32, of the critic
    sequences: Array  # [] float32, rows with a real token


def count_experience(experience: Experience) -> Counts:
    """The counts of a minibatch."""
    mask, value_mask = experience.mask, experience.value_mask

    def at_least_one(x: Array) -> Array:
        return jnp.maximum(jnp.sum(x), 1).astype(jnp.float32)

    tokens = at_least_one(mask)
    return Counts(
        tokens=tokens,
        value_tokens=tokens if value_mask is None else at_least_one(value_mask),
        sequences=at_least_one(jnp.any(mask, axis=1)),
    )
