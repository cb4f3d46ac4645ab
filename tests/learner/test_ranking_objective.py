"""Objectives of reward models: margins, and losses of whole rankings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.preferences import pairwise_ranking_loss, plackett_luce_loss
from rlhf_jax.algo.types import Preferences, Rankings, Sequences
from rlhf_jax.learner.gradients import accumulate_gradients
from rlhf_jax.learner.preference import (
    count_rankings,
    preference_objective,
    ranking_objective,
)

WEIGHTS = jnp.array([0.5, -0.25, 0.125, 1.5])


def mean_weight(weights, tokens, mask):
    """The mean weight of a text's tokens; NaN of a text without any."""
    total = jnp.sum(jnp.where(mask, weights[tokens], 0.0), axis=1)
    return total / jnp.sum(mask, axis=1)


def plackett_luce(scores, batch):
    return plackett_luce_loss(scores, mask=batch.mask)


def pairwise(scores, batch):
    return pairwise_ranking_loss(scores, batch.grades, mask=batch.mask, margin_step=0.5)


def one_token(ids):
    tokens = jnp.asarray(ids)[..., None]
    return Sequences(tokens=tokens, mask=jnp.ones_like(tokens, bool))


def rankings():
    """Three answers in an order; and two of them, and an empty place."""
    answers = one_token([[3, 0, 1], [2, 0, 0]])
    real = jnp.array([[True, True, True], [True, True, False]])
    return Rankings(
        answers=Sequences(tokens=answers.tokens, mask=real[..., None]),
        grades=jnp.array([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
        mask=real,
    )


def test_margin_of_each_pair_by_hand():
    batch = Preferences(
        chosen=one_token([0, 1]),
        rejected=one_token([2, 3]),
        margin=jnp.array([1.0, 0.25]),
    )
    loss, metrics = preference_objective(mean_weight)(WEIGHTS, batch, 2.0)
    # gaps: 0.5 − 0.125 − 1 and −0.25 − 1.5 − 0.25
    want = np.log1p(np.exp([0.625, 2.0])).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], (0.375 - 1.75) / 2)  # of the scores


def test_rankings_by_hand():
    # scores: 1.5 > 0.5 > −0.25, and 0.125 > 0.5, the wrong way round
    loss, metrics = ranking_objective(mean_weight, plackett_luce, center_coef=0.3)(
        WEIGHTS, rankings(), 2.0
    )
    e = np.exp
    first = -np.log(
        e(1.5) / (e(1.5) + e(0.5) + e(-0.25)) * e(0.5) / (e(0.5) + e(-0.25))
    )
    second = -np.log(e(0.125) / (e(0.125) + e(0.5)))
    centre = 0.6 * (1.75 / 3) ** 2 + 0.6 * 0.3125**2
    np.testing.assert_allclose(loss, (first + second + centre) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (1.0 + 0.0) / 2)
    gaps = (1.0 + 1.75 + 0.75) / 3
    np.testing.assert_allclose(metrics["margin"], (gaps - 0.375) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["score_mean"], (1.75 / 3 + 0.3125) / 2)


def test_pairwise_loss_has_the_margins_of_the_grades():
    loss, _ = ranking_objective(mean_weight, pairwise)(WEIGHTS, rankings(), 2.0)
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    # gaps less half the difference of the grades: 1 − .5, 1.75 − 1, .75 − .5
    first = np.mean([softplus(-0.5), softplus(-0.75), softplus(-0.25)])
    want = (first + softplus(0.375 + 0.5)) / 2
    np.testing.assert_allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("loss_fn", [plackett_luce, pairwise])
def test_an_empty_place_adds_nothing_to_the_gradient(loss_fn):
    batch = rankings()
    # A product, whose gradient there would be 0 · NaN.
    score_fn = lambda weights, *text: weights[3] * mean_weight(weights, *text)  # noqa: E731
    compute = jax.grad(ranking_objective(score_fn, loss_fn), has_aux=True)
    grads, _ = compute(WEIGHTS, batch, 2.0)
    assert np.isfinite(grads).all() and np.any(grads)
    # Neither the text nor the grade that stands in the empty place matters.
    other = Rankings(
        answers=Sequences(
            tokens=batch.answers.tokens.at[1, 2].set(3), mask=batch.answers.mask
        ),
        grades=batch.grades.at[1, 2].set(jnp.nan),
        mask=batch.mask,
    )
    np.testing.assert_array_equal(compute(WEIGHTS, other, 2.0)[0], grads)


def test_microbatches_change_nothing():
    batch = rankings()
    objective = ranking_objective(mean_weight, plackett_luce, center_coef=0.3)
    run = lambda n: accumulate_gradients(  # noqa: E731
        objective, WEIGHTS, batch, count_rankings(batch), num_microbatches=n
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(1),
        run(2),
    )
