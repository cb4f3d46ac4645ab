"""`best_of_n.py` against every subset of the samples, and an exact KL."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.best_of_n import best_of_n_kl, best_of_n_mean


def over_all_subsets(scores, values, n):
    """The definition: every subset of n in turn; equal best ones share the win."""
    picked = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        picked.append(np.mean([values[i] for i in subset if scores[i] == top]))
    return np.mean(picked)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_is_the_mean_over_all_subsets(maybe_jit, rng, n, ties):
    scores = rng.normal(size=(5, 7)).astype(np.float32)
    values = rng.normal(size=(5, 7)).astype(np.float32)
    if ties:
        scores = np.round(scores)
        assert any(len(set(row.tolist())) < 7 for row in scores)
    fn = maybe_jit(functools.partial(best_of_n_mean, n=n))
    got = fn(jnp.asarray(scores), jnp.asarray(values))
    pairs = zip(scores.astype(float), values.astype(float), strict=True)
    want = [over_all_subsets(s, v, n) for s, v in pairs]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_by_hand():
    # Of the pairs of 3 samples, two have the highest score in them and one the next.
    scores, values = jnp.array([[0.5, 2.5, 1.5]]), jnp.array([[9.0, -1.0, 4.0]])
    np.testing.assert_allclose(
        best_of_n_mean(scores, values, n=2), [(2 * -1.0 + 4.0) / 3], rtol=1e-6
    )
    np.testing.assert_allclose(best_of_n_mean(scores, values, n=1), [4.0], rtol=1e-6)
    np.testing.assert_allclose(best_of_n_mean(scores, values, n=3), [-1.0], rtol=1e-6)


def test_is_unbiased_over_draws_of_the_samples():
    """All samples of 4 from a policy with three answers, weighed by probability."""
    probabilities, score = [0.2, 0.5, 0.3], [1.5, 0.5, 2.5]
    value = np.array([2.0, 1.0, -3.0], np.float32)
    draws = np.array(list(itertools.product(range(3), repeat=4)))
    weights = np.prod(np.take(probabilities, draws), axis=1)
    scores = jnp.asarray(np.take(score, draws), jnp.float32)
    got = weights @ np.asarray(best_of_n_mean(scores, jnp.asarray(value[draws]), n=2))
    # By score 0.5 < 1.5 < 2.5 the probabilities add up to 0.5, 0.7 and 1; the best of
    # two is below a score with the square of that.
    want = 0.5**2 * 1.0 + (0.7**2 - 0.5**2) * 2.0 + (1 - 0.7**2) * -3.0
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_many_samples_stay_exact():
    # Values 0 … N − 1 in the order of the scores: the best of n has mean
    # n(N + 1)/(n + 1) − 1, the largest of n without replacement.
    total = 400
    order = jnp.arange(total, dtype=jnp.float32)[None]
    for n in (1, 3, 64, 256, 400):
        want = n * (total + 1) / (n + 1) - 1
        np.testing.assert_allclose(best_of_n_mean(order, order, n=n), want, rtol=1e-5)


def test_no_gradient_and_wrong_input():
    x = jnp.array([[0.5, 1.5]])
    grads = jax.grad(lambda v: best_of_n_mean(x, v, n=2).sum())(x)
    np.testing.assert_array_equal(grads, np.zeros((1, 2)))
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"n={n}: expected in 1 … 2"):
            best_of_n_mean(x, x, n=n)
    with pytest.raises(AssertionError, match="rank"):
        best_of_n_mean(x[0], x[0], n=1)
    with pytest.raises(AssertionError, match="type"):
        best_of_n_mean(x, jnp.ones((1, 2), jnp.int32), n=1)
    with pytest.raises(ValueError, match="n=0: expected 1 or more"):
        best_of_n_kl(0)


def exact_kl(probabilities, n):
    """KL(best of n ‖ policy) of answers in the order of their scores, all different."""
    cumulated = np.cumsum(probabilities)
    before = np.concatenate([[0.0], cumulated[:-1]])
    best = cumulated**n - before**n
    seen = best > 0  # the worst of very many, to the power of n, underflow
    return np.sum(best[seen] * np.log(best[seen] / probabilities[seen]))


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_kl_bounds_and_is_reached_where_no_answer_comes_twice(n):
    few = exact_kl(np.array([0.1, 0.4, 0.3, 0.2]), n)
    assert few <= best_of_n_kl(n) + 1e-12
    many = exact_kl(np.full(200_000, 1 / 200_000), n)
    np.testing.assert_allclose(best_of_n_kl(n), many, rtol=1e-3, atol=1e-9)
    if n > 1:
        assert few < 0.9 * best_of_n_kl(n)


def test_kl_by_hand():
    assert best_of_n_kl(1) == 0.0
    np.testing.assert_allclose(best_of_n_kl(8), math.log(8) - 7 / 8, rtol=1e-12)
