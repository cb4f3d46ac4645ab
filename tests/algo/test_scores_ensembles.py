"""`ensembles.py` by hand, against loops, and by what charging for doubt must do."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.scores import combine_scores

# Three models, two answers: they agree on the first, differ on the second.
SCORES = jnp.array([[1.5, 4.0], [1.5, 1.0], [1.5, -0.5]])


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("mean", [1.5, 1.5]),
        ("worst", [1.5, -0.5]),
        # Deviations 2.5, −0.5, −2: variance (6.25 + 0.25 + 4) / 3 = 3.5
        ("mean-minus-std", [1.5, 1.5 - 0.5 * 3.5**0.5]),
    ],
)
def test_by_hand(maybe_jit, how, want):
    combine = maybe_jit(functools.partial(combine_scores, how=how, penalty=0.5))
    got = combine(SCORES)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("how", ["mean", "worst", "mean-minus-std"])
def test_matches_statistics(rng, how):
    scores = rng.normal(size=(5, 9)).astype(np.float32)
    answers = scores.T.astype(float).tolist()
    by_loop = {
        "mean": [statistics.fmean(a) for a in answers],
        "worst": [min(a) for a in answers],
        "mean-minus-std": [
            statistics.fmean(a) - 2 * statistics.pstdev(a) for a in answers
        ],
    }
    got = combine_scores(jnp.asarray(scores), how=how, penalty=2.0)
    np.testing.assert_allclose(got, by_loop[how], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "worst", "mean-minus-std"])
def test_one_model_is_itself_and_order_does_not_matter(rng, how):
    scores = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    got = combine_scores(scores[:1], how=how, penalty=3.0)
    np.testing.assert_allclose(got, scores[0], rtol=1e-6)
    np.testing.assert_allclose(
        combine_scores(scores[::-1], how=how),
        combine_scores(scores, how=how),
        rtol=1e-5,
        atol=1e-6,
    )


def test_no_gradient_even_where_models_agree():
    grads = jax.grad(lambda s: combine_scores(s, how="mean-minus-std").sum())(SCORES)
    np.testing.assert_array_equal(grads, np.zeros((3, 2)))


def test_a_traced_penalty_is_one_program():
    at = jax.jit(lambda p: combine_scores(SCORES, how="mean-minus-std", penalty=p))
    np.testing.assert_allclose(at(0.0), [1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(at(2.0), [1.5, 1.5 - 2 * 3.5**0.5], rtol=1e-6)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"how='median': expected one of mean, worst"):
        combine_scores(SCORES, how="median")
    with pytest.raises(ValueError, match=r"penalty=-1\.0: expected 0 or more"):
        combine_scores(SCORES, how="mean-minus-std", penalty=-1.0)
    with pytest.raises(AssertionError, match="rank"):
        combine_scores(SCORES[0])
    with pytest.raises(AssertionError, match="type"):
        combine_scores(jnp.ones((2, 3), jnp.int32))
