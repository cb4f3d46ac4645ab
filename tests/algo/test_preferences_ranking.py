"""`ranking.py` by hand, against the definitions as loops, and by invariances."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.preferences import (
    pairwise_ranking_loss,
    plackett_luce_loss,
    preference_loss,
)

ALL = jnp.ones((1, 3), bool)
MASK = np.array(
    [
        [True, True, True, True, True],
        [True, True, False, False, False],
        [False, True, False, True, True],  # gaps
        [True, False, False, False, False],
        [False, False, False, False, False],
    ]
)


def plackett_luce_row(scores):
    """Draws without replacement, one factor per draw."""
    weights = np.exp(np.asarray(scores, np.float64))
    probability = 1.0
    for k in range(len(weights)):
        probability *= weights[k] / weights[k:].sum()
    return -math.log(probability)


def pairwise_row(scores, grades, step, smoothing):
    losses = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if grades[i] > grades[j]:
            gap = float(scores[i] - scores[j] - step * (grades[i] - grades[j]))
            losses.append(
                (1 - smoothing) * math.log1p(math.exp(-gap))
                + smoothing * math.log1p(math.exp(gap))
            )
    return sum(losses) / len(losses) if losses else 0.0


@pytest.fixture
def scores(rng):
    return rng.normal(size=MASK.shape).astype(np.float32)


@pytest.fixture
def grades(rng):
    """Three grades for five answers: every full row has ties."""
    return rng.integers(0, 3, MASK.shape) + np.float32(0.5)


def filled(x, garbage):
    return jnp.asarray(np.where(MASK, x, np.float32(garbage)))


def test_plackett_luce_by_hand(maybe_jit):
    # Weights 4, 2, 1: P = 4/7 · 2/3 · 1/1; backwards 1/7 · 2/6 · 1.
    scores = jnp.log(jnp.array([[4.0, 2.0, 1.0], [1.0, 2.0, 4.0], [3.0, 3.0, 3.0]]))
    mask = jnp.ones((3, 3), bool)
    got = maybe_jit(plackett_luce_loss)(scores, mask=mask)
    np.testing.assert_allclose(got, np.log([21 / 8, 21, 6]), rtol=1e-5)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, -np.inf, 1e6])
def test_plackett_luce_of_rows_with_padding(maybe_jit, scores, garbage):
    got = maybe_jit(plackett_luce_loss)(filled(scores, garbage), mask=jnp.array(MASK))
    want = [plackett_luce_row(row[m]) for row, m in zip(scores, MASK, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_two_answers_are_a_preference(scores):
    got = plackett_luce_loss(jnp.array(scores[:, :2]), mask=jnp.ones((5, 2), bool))
    want = preference_loss(jnp.array(scores[:, 0]), jnp.array(scores[:, 1]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_all_orders_have_probability_one(scores):
    orders = jnp.array(list(itertools.permutations(scores[0, :4].tolist())))
    losses = plackett_luce_loss(orders, mask=jnp.ones(orders.shape, bool))
    np.testing.assert_allclose(jnp.sum(jnp.exp(-losses)), 1.0, rtol=1e-5)


def test_pairwise_by_hand(maybe_jit):
    # Scores 1, 0, 3 in places 1, 2, 2: two pairs with gaps 1 and −2, no third.
    scores = jnp.array([[1.0, 0.0, 3.0]])
    fn = functools.partial(pairwise_ranking_loss, mask=ALL)
    got = maybe_jit(fn)(scores, jnp.array([[-1.0, -2.0, -2.0]]))
    want = 0.5 * (np.log1p(np.exp(-1.0)) + np.log1p(np.exp(2.0)))
    np.testing.assert_allclose(got, [want], rtol=1e-5)
    # Grades 5, 3, 3: each pair is 2 apart, so the margin is 1.
    got = maybe_jit(functools.partial(fn, margin_step=0.5))(
        scores, jnp.array([[5.0, 3.0, 3.0]])
    )
    want = 0.5 * (np.log(2) + np.log1p(np.exp(3.0)))
    np.testing.assert_allclose(got, [want], rtol=1e-5)


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, -np.inf, 1e6])
@pytest.mark.parametrize(("step", "smoothing"), [(0.0, 0.0), (0.75, 0.1)])
def test_pairwise_of_rows_with_padding(
    maybe_jit, scores, grades, garbage, step, smoothing
):
    fn = functools.partial(
        pairwise_ranking_loss, margin_step=step, label_smoothing=smoothing
    )
    got = maybe_jit(fn)(
        filled(scores, garbage), filled(grades, garbage), mask=jnp.array(MASK)
    )
    want = [
        pairwise_row(s[m], g[m], step, smoothing)
        for s, g, m in zip(scores, grades, MASK, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_pairwise_does_not_see_the_order_of_the_columns(scores, grades):
    order = np.array([3, 0, 4, 1, 2])
    got = pairwise_ranking_loss(
        jnp.array(scores[:, order]),
        jnp.array(grades[:, order]),
        mask=jnp.array(MASK[:, order]),
    )
    want = pairwise_ranking_loss(
        jnp.array(scores), jnp.array(grades), mask=jnp.array(MASK)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def loss_fns(grades):
    mask = jnp.array(MASK)
    return {
        "plackett_luce": lambda s: plackett_luce_loss(s, mask=mask),
        "pairwise": lambda s: pairwise_ranking_loss(
            s, filled(grades, 1e6), mask=mask, margin_step=0.5
        ),
    }


@pytest.mark.parametrize("name", ["plackett_luce", "pairwise"])
def test_depends_on_differences_alone(scores, grades, name):
    loss = loss_fns(grades)[name]
    np.testing.assert_allclose(
        loss(jnp.array(scores + 2.5)), loss(jnp.array(scores)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["plackett_luce", "pairwise"])
def test_gradient_by_central_differences(scores, grades, name):
    loss = loss_fns(grades)[name]
    got = jax.grad(lambda s: jnp.sum(loss(s)))(filled(scores, np.nan))
    rows = {
        "plackett_luce": lambda s, g: plackett_luce_row(s),
        "pairwise": lambda s, g: pairwise_row(s, g, 0.5, 0.0),
    }[name]
    want = np.zeros(MASK.shape)
    for n, k in zip(*np.nonzero(MASK), strict=True):
        for sign in (1, -1):
            moved = scores.astype(np.float64)
            moved[n, k] += sign * 1e-4
            value = rows(moved[n][MASK[n]], grades[n][MASK[n]])
            want[n, k] += sign * value / 2e-4
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got)[~MASK], 0.0)
    # Only differences count, so what one answer gains the others lose.
    np.testing.assert_allclose(jnp.sum(got, axis=1), np.zeros(5), atol=1e-6)
    assert np.abs(want[0]).min() > 1e-3


@pytest.mark.parametrize("name", ["plackett_luce", "pairwise"])
def test_padding_makes_no_nan_on_the_way(scores, grades, name):
    loss = loss_fns(grades)[name]
    with jax.debug_nans(True):
        value, grad = jax.value_and_grad(lambda s: jnp.sum(loss(s)))(jnp.array(scores))
    assert value > 0 and np.all(np.isfinite(grad))


def test_extremes_are_finite():
    far = jnp.array([[-1e4, 0.0, 1e4]])
    grades = jnp.array([[3.0, 2.0, 1.0]])
    value, grad = jax.value_and_grad(
        lambda s: jnp.sum(plackett_luce_loss(s, mask=ALL))
    )(far)
    np.testing.assert_allclose(value, 2e4 + 1e4, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1, -1, 2]], rtol=1e-6)
    value, grad = jax.value_and_grad(
        lambda s: jnp.sum(pairwise_ranking_loss(s, grades, mask=ALL))
    )(far)
    np.testing.assert_allclose(value, (1e4 + 2e4 + 1e4) / 3, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-2 / 3, 0, 2 / 3]], rtol=1e-6, atol=1e-6)


def test_dtypes_and_wrong_input():
    scores = jnp.array([[1.5, 0.5, -0.5]])
    low = scores.astype(jnp.bfloat16)
    for got, want in (
        (plackett_luce_loss(low, mask=ALL), plackett_luce_loss(scores, mask=ALL)),
        (
            pairwise_ranking_loss(low, low, mask=ALL),
            pairwise_ranking_loss(scores, scores, mask=ALL),
        ),
    ):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == jnp.float32
    with pytest.raises(AssertionError, match="type"):
        plackett_luce_loss(jnp.array([[2, 1, 0]]), mask=ALL)
    with pytest.raises(AssertionError, match="type"):
        pairwise_ranking_loss(scores, jnp.array([[2, 1, 0]]), mask=ALL)
    with pytest.raises(AssertionError, match="shape"):
        plackett_luce_loss(scores, mask=ALL[:, :2])
    with pytest.raises(AssertionError, match="rank"):
        plackett_luce_loss(scores[0], mask=ALL[0])
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5: expected in"):
        pairwise_ranking_loss(scores, scores, mask=ALL, label_smoothing=0.5)
