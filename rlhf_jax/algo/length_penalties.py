"""What an answer costs for its length."""

import chex
import jax.numpy as jnp

from rlhf_jax.algo.types import Array


def soft_overlong_penalty(lengths: Array, *, limit: int, buffer: int) -> Array:
    """DAPO's soft overlong punishment, to be added to the scores.

        0                                where length ≤ limit − buffer
        (limit − buffer − length)/buffer in between, from 0 to −1
        −1                               where length > limit

    A hard punishment of truncated answers also hits sound reasoning that was a little
    too long; this ramp says in advance that the end is near. Choose it where answers
    run into the generation limit, with `limit` at most that: a larger one is never
    reached. The scale supposes scores of about ±1.

    Args:
        lengths: `[B]` integer, response tokens through the first stop token.
        limit: L_max, in tokens.
        buffer: L_cache, in tokens, the length of the ramp below `limit`.

    Returns:
        `[B]` float32, in [−1, 0].

    Raises:
        ValueError: when `buffer` is not in 1 … `limit`.
        AssertionError: on a wrong rank or dtype.

    References:
        Yu et al., 2025, arXiv:2503.14476, eq. 13 (there `limit` is 20,480 and `buffer`
        4,096).
    """
    chex.assert_rank(lengths, 1)
    chex.assert_type(lengths, int)
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer={buffer}: expected in 1 … limit={limit}")
    limit, buffer = int(limit), int(buffer)
    over = lengths.astype(jnp.float32) - (limit - buffer)
    return jnp.clip(-over / buffer, -1.0, 0.0)
