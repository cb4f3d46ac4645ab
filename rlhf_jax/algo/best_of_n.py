"""Best of n: the sample with the highest score among n."""

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array


def best_of_n_kl(n: int) -> float:
    """Upper bound on the KL of best of n to the sampling policy.

        KL ≤ log n − (n − 1)/n

    With equality if scores never tie, as for a continuous distribution of scores; ties
    and repeated responses make the KL smaller.

    Args:
        n: samples per prompt, at least 1.

    Returns:
        A bound on the KL, in nats; 0 for n = 1.

    Raises:
        ValueError: when `n` is below 1.

    References:
        Stiennon et al., 2020, arXiv:2009.01325, appendix G.3; proof of the bound:
        Beirami et al., 2024, arXiv:2401.01879, theorem 3.1.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected 1 or more")
    n = int(n)  # a NumPy integer would give a NumPy float
    return math.log(n) - (n - 1) / n


def best_of_n_mean(scores: Array, values: Array, *, n: int) -> Array:
    """Expected value of the best of n samples by score, from N ≥ n samples.

    The mean, over all subsets of n of the N samples, of the value of the sample with
    the highest score; ties are averaged. With L_i samples below sample i, and E_i equal
    to it (including itself):

        Σ_i v_i · [C(L_i + E_i, n) − C(L_i, n)] / (E_i · C(N, n))

    Unbiased for every n, with much less variance than a single draw of n. Scores and
    values may be the same array, for the proxy reward itself.

    Args:
        scores: `[B, N]` float, the selection scores: N samples for each of B prompts.
        values: `[B, N]` float, the value of each sample.
        n: number of samples to select from, in 1 … N.

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
    # Python integers: binomials of a few hundred samples overflow floats.
    subsets = math.comb(total, n)
    share = jnp.array(
        [math.comb(count, n) / subsets for count in range(total + 1)], jnp.float32
    )  # [N + 1], share of subsets within the `count` lowest

    def weigh(row: Array) -> Array:
        ascending = jnp.sort(row)
        below = jnp.searchsorted(ascending, row, side="left")
        through = jnp.searchsorted(ascending, row, side="right")
        equal = (through - below).astype(jnp.float32)
        return (share[through] - share[below]) / equal

    weights = jax.vmap(weigh)(scores.astype(jnp.float32))
    return jax.lax.stop_gradient(jnp.sum(weights * values.astype(jnp.float32), axis=1))


def pass_at_k(num_correct: Array, *, num_samples: int, k: int) -> Array:
    """Unbiased pass@k from n responses per problem.

        1 − C(n − c, k) / C(n, k)

    the share of all subsets of k of the n responses that contain a correct one. The
    plug-in estimate 1 − (1 − c/n)^k is too low.

    Args:
        num_correct: `[N]` integer, c, correct responses per problem, at most n.
        num_samples: n.
        k: at least 1 and at most n.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: if k is not between 1 and n.
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
    ]  # incorrect and total responses left at each draw
    none_right = jnp.maximum(num_wrong - drawn, 0) / (num_samples - drawn)
    return 1.0 - jnp.prod(none_right.astype(jnp.float32), axis=-1)
