"""Best of n: the answer that a score likes best among n samples."""

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array


def best_of_n_kl(n: int) -> float:
    """KL of the best of n samples to the policy they come from.

        KL ≤ log n − (n − 1)/n

    With equality where two samples never have the same score, as under a continuous
    distribution of scores; ties, and answers likely enough to come twice, make the KL
    smaller.

    Args:
        n: samples per prompt, at least 1.

    Returns:
        A bound on the KL, in nats; 0 for n = 1.

    Raises:
        ValueError: when `n` is below 1.

    References:
        Stiennon et al., 2020, arXiv:2009.01325, appendix G.3; that it is a bound:
        Beirami et al., 2024, arXiv:2401.01879, theorem 3.1.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected 1 or more")
    n = int(n)  # a NumPy integer would give a NumPy float
    return math.log(n) - (n - 1) / n


def best_of_n_mean(scores: Array, values: Array, *, n: int) -> Array:
    """Expected value of the best of n samples by score, from N ≥ n samples.

    The mean over all subsets of n of the N samples, of the value of the one with the
    highest score; equal scores share the win. With L_i samples below sample i, and E_i
    equal to it (itself too):

        Σ_i v_i · [C(L_i + E_i, n) − C(L_i, n)] / (E_i · C(N, n))

    Unbiased for every n at once, with far less variance than one draw of n. Scores and
    values may be the same array: the proxy reward of the proxy's choice.

    Args:
        scores: `[B, N]` float, what picks: N samples to each of B prompts.
        values: `[B, N]` float, what is measured of the one picked.
        n: samples to pick from, in 1 … N.

    Returns:
        `[B]` float32, without a gradient.

    Raises:
        ValueError: when `n` is not in 1 … N.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Nakano et al., 2021, arXiv:2112.09332, appendix I; Gao et al., 2022,
        arXiv:2210.10760. Neither has ties.
    """
    chex.assert_rank([scores, values], 2)
    chex.assert_equal_shape([scores, values])
    chex.assert_type([scores, values], float)
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"n={n}: expected in 1 … {total}, the samples per prompt")
    # Python's integers: the binomials of a few hundred samples overflow any float.
    subsets = math.comb(total, n)
    share = jnp.array(
        [math.comb(count, n) / subsets for count in range(total + 1)], jnp.float32
    )  # [N + 1], of the subsets, those among the `count` lowest

    def weigh(row: Array) -> Array:
        ascending = jnp.sort(row)
        below = jnp.searchsorted(ascending, row, side="left")
        through = jnp.searchsorted(ascending, row, side="right")
        equal = (through - below).astype(jnp.float32)
        return (share[through] - share[below]) / equal

    weights = jax.vmap(weigh)(scores.astype(jnp.float32))
    return jax.lax.stop_gradient(jnp.sum(weights * values.astype(jnp.float32), axis=1))


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
