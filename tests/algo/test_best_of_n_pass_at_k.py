"""`pass_at_k.py` against every choice of k among n answers."""

from functools import partial
from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import pass_at_k


def share_of_choices(num_correct, num_samples, k):
    """Share of all choices of k answers that hold one of the first `num_correct`."""
    choices = list(combinations(range(num_samples), k))
    return sum(min(choice) < num_correct for choice in choices) / len(choices)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_every_choice_of_k(num_samples):
    correct = range(num_samples + 1)
    for k in range(1, num_samples + 1):
        got = pass_at_k(jnp.array(correct), num_samples=num_samples, k=k)
        want = [share_of_choices(c, num_samples, k) for c in correct]
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
        assert got.dtype == jnp.float32
        # Exactly, whatever the rounding between them: none right, and all right.
        assert got[0] == 0 and got[-1] == 1


def test_by_hand(maybe_jit):
    # 3 of 5 are right, 2 are wrong: 1 of the 10 pairs has no right one, and no triple.
    correct = jnp.array([3])
    for k, want in ((1, 0.6), (2, 0.9), (3, 1.0)):
        got = maybe_jit(partial(pass_at_k, num_samples=5, k=k))(correct)
        np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_one_of_many_samples():
    # n! has no float32: 1 − C(n − 1, k) / C(n, k) = k / n.
    got = pass_at_k(jnp.array([1]), num_samples=1000, k=300)
    np.testing.assert_allclose(got, [0.3], rtol=1e-5)


def test_it_is_unbiased():
    # c of n = 6 answers, each right with probability ¼, is binomial.
    p, n, k = 0.25, 6, 3
    chances = [len(list(combinations(range(n), c))) for c in range(n + 1)]
    chances = [many * p**c * (1 - p) ** (n - c) for c, many in enumerate(chances)]
    got = pass_at_k(jnp.arange(n + 1), num_samples=n, k=k)
    np.testing.assert_allclose(np.dot(chances, got), 1 - (1 - p) ** k, rtol=1e-5)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"^k={k}: expected 1 to num_samples=4$"):
        pass_at_k(jnp.array([2]), num_samples=4, k=k)


@pytest.mark.parametrize("num_correct", [[0.5], 2], ids=["a share", "one problem"])
def test_a_wrong_dtype_or_rank_is_refused(num_correct):
    with pytest.raises(AssertionError):
        pass_at_k(jnp.array(num_correct), num_samples=4, k=2)
