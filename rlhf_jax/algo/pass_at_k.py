"""How often one of k answers to a problem is right."""

import chex
import jax.numpy as jnp

from rlhf_jax.algo.types import Array


def pass_at_k(num_correct: Array, *, num_samples: int, k: int) -> Array:
    """Unbiased estimate, from n answers to a problem, that one of k is right.

        1 − C(n − c, k) / C(n, k)

    which is the share of all choices of k among the n answers that hold a right one.
    1 − (1 − c/n)^k, the plug-in estimate, is too low.

    Args:
        num_correct: `[N]` integer, c, right answers to each problem, at most n.
        num_samples: n.
        k: at least 1 and at most n.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: when k does not lie between 1 and n.
        AssertionError: on a wrong rank or dtype.

    References:
        Chen et al., 2021, arXiv:2107.03374, eq. 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k}: expected 1 to num_samples={num_samples}")
    chex.assert_rank(num_correct, 1)
    chex.assert_type(num_correct, int)
    num_samples, k = int(num_samples), int(k)
    num_wrong = num_samples - num_correct.astype(jnp.int32)[:, None]
    drawn = jnp.arange(k, dtype=jnp.int32)[
        None, :
    ]  # wrong ones, and all, that are left at each draw
    none_right = jnp.maximum(num_wrong - drawn, 0) / (num_samples - drawn)
    return 1.0 - jnp.prod(none_right.astype(jnp.float32), axis=-1)
