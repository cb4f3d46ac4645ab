"""`rewards.py` by hand, by its sums, and by invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.advantages import gae
from rlhf_jax.algo.masking import include_end_state
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.scores import penalize_missing_eos


@pytest.fixture
def batch(rng, mask):
    scores = rng.normal(size=3).astype(np.float32)
    logprobs, ref_logprobs = -rng.exponential(size=(2, *mask.shape)).astype(np.float32)
    return scores, logprobs, ref_logprobs, mask


def test_penalty_by_hand(maybe_jit):
    scores, truncated = jnp.array([0.7, -1.3, 2.5]), jnp.array([True, False, True])
    subtract = maybe_jit(functools.partial(penalize_missing_eos, penalty=1.5))
    np.testing.assert_allclose(
        subtract(scores, truncated), [-0.8, -1.3, 1.0], rtol=1e-6
    )
    replace = maybe_jit(
        functools.partial(penalize_missing_eos, penalty=-1.0, mode="replace")
    )
    once = replace(scores, truncated)
    np.testing.assert_allclose(once, [-1.0, -1.3, -1.0], rtol=1e-6)
    np.testing.assert_array_equal(replace(once, truncated), once)


def test_penalty_takes_integers_and_half_precision():
    scores = jnp.array([0.5, 1.5], jnp.bfloat16)
    got = penalize_missing_eos(scores, jnp.array([True, False]), penalty=1)
    np.testing.assert_array_equal(got, [-0.5, 1.5])
    assert got.dtype == jnp.float32
    with pytest.raises(AssertionError, match="type"):
        penalize_missing_eos(jnp.array([1, 2]), jnp.array([True, False]), penalty=1)
    with pytest.raises(ValueError, match="mode='clip'"):
        penalize_missing_eos(scores, jnp.array([True, False]), penalty=1, mode="clip")


@pytest.mark.parametrize(
    ("position", "want"),
    [
        # β = 0.5; kl = logprob − ref = 0.4, −0.2 | 0.6, 0.2, −0.8 | none
        ("last_token", [[-0.2, 1.6, 0], [-0.3, -0.1, -0.3], [0, 0, 0]]),
        # Row 0: the score moves one column on; row 1 is full.
        ("after_last_token", [[-0.2, 0.1, 1.5], [-0.3, -0.1, -0.3], [0, 0, 0]]),
    ],
)
def test_rewards_by_hand(maybe_jit, position, want):
    scores = jnp.array([1.5, -0.7, 9.0])
    logprobs = jnp.array([[-1.0, -2.0, np.nan], [-0.5, -0.7, -1.3], [np.inf] * 3])
    ref = jnp.array([[-1.4, -1.8, np.nan], [-1.1, -0.9, -0.5], [np.inf] * 3])
    mask = jnp.array([[True, True, False], [True, True, True], [False] * 3])
    fn = functools.partial(shape_rewards, kl_coef=0.5, score_position=position)
    rewards, kl = maybe_jit(fn)(scores, logprobs, ref, mask)
    np.testing.assert_allclose(rewards, want, rtol=1e-5, atol=1e-6)
    want_kl = [[0.4, -0.2, 0], [0.6, 0.2, -0.8], [0, 0, 0]]
    np.testing.assert_allclose(kl, want_kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["last_token", "after_last_token"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_row_sums(batch, estimator, position):
    # Σ r = s − β · Σ kl
    scores, *_ = arrays = tuple(map(jnp.asarray, batch))
    rewards, kl = shape_rewards(
        *arrays, kl_coef=0.3, estimator=estimator, score_position=position
    )
    want = scores - 0.3 * np.sum(np.asarray(kl), axis=1)
    np.testing.assert_allclose(np.sum(rewards, axis=1), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(kl)[~batch[3]], 0)


def test_fractional_scores_sit_on_one_column(batch):
    scores, logprobs, _, mask = map(jnp.asarray, batch)
    for position, columns in (
        ("last_token", [0, 3, 6]),
        ("after_last_token", [1, 4, 6]),
    ):
        rewards, _ = shape_rewards(
            scores, logprobs, logprobs, mask, kl_coef=0.3, score_position=position
        )
        want = np.zeros(mask.shape, np.float32)
        want[range(3), columns] = scores
        np.testing.assert_array_equal(rewards, want)


def test_score_follows_the_last_token_of_a_row_with_gaps():
    mask = jnp.array([[True, False, True, False]])
    zeros = jnp.zeros((1, 4))
    rewards, _ = shape_rewards(jnp.array([0.7]), zeros, zeros, mask, kl_coef=0.1)
    np.testing.assert_allclose(rewards, [[0, 0, 0.7, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("position", "want"),
    [
        ("last_token", [0.82675, 0.765, 0.7, 0, 0]),
        ("after_last_token", [0.8132125, 0.75075, 0.685, 0.3, 0]),
    ],
)
def test_score_positions_through_gae(position, want):
    # F1, from the score to the advantages.
    mask = jnp.array([[True, True, True, False, False]])
    zeros = jnp.zeros((1, 5))
    rewards, _ = shape_rewards(
        jnp.array([1.0]), zeros, zeros, mask, kl_coef=0.1, score_position=position
    )
    states = include_end_state(mask) if position == "after_last_token" else mask
    values = jnp.array([[0.1, 0.2, 0.3, 0.7, np.nan]])
    advantages, _ = gae(rewards, values, states)
    np.testing.assert_allclose(advantages, [want], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_padding_is_never_read(maybe_jit, batch, garbage):
    scores, logprobs, ref, mask = batch
    fn = maybe_jit(functools.partial(shape_rewards, kl_coef=0.3, estimator="k3"))
    dirty = (np.where(mask, x, np.float32(garbage)) for x in (logprobs, ref))
    clean = fn(*map(jnp.asarray, batch))
    other = fn(*map(jnp.asarray, (scores, *dirty, mask)))
    jax.tree.map(np.testing.assert_array_equal, other, clean)


def test_batch_order_and_pad_columns_are_irrelevant(batch):
    scores, logprobs, ref, mask = batch
    order = np.array([2, 0, 1])
    wider = [np.pad(x, ((0, 0), (0, 2)))[order] for x in (logprobs, ref, mask)]
    straight = shape_rewards(*map(jnp.asarray, batch), kl_coef=0.3)
    other = shape_rewards(*map(jnp.asarray, (scores[order], *wider)), kl_coef=0.3)
    for got, want in zip(other, straight, strict=True):
        np.testing.assert_array_equal(got, np.pad(want, ((0, 0), (0, 2)))[order])


def test_rewards_carry_no_gradient(batch):
    scores, logprobs, ref, mask = map(jnp.asarray, batch)

    def total(scores, logprobs):
        rewards, kl = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.3)
        return rewards.sum() + kl.sum()

    for grad in jax.grad(total, argnums=(0, 1))(scores, logprobs):
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_integer_scores_and_unknown_positions_are_refused(batch):
    scores, logprobs, ref, mask = map(jnp.asarray, batch)
    with pytest.raises(AssertionError, match="type"):
        shape_rewards(scores.astype(jnp.int32), logprobs, ref, mask, kl_coef=0.3)
    with pytest.raises(ValueError, match="score_position='eos'"):
        shape_rewards(scores, logprobs, ref, mask, kl_coef=0.3, score_position="eos")


@pytest.mark.parametrize("as_type", [jnp.float32, jnp.bfloat16])
def test_a_coefficient_per_row_where_rows_are_as_many_as_tokens(maybe_jit, as_type):
    # kl = logprob − ref = 1 everywhere; β = 0.5 in row 0 and 2 in row 1.
    ones, zeros = jnp.ones((2, 2)), jnp.zeros((2, 2))
    mask = jnp.array([[True, True], [True, True]])
    fn = maybe_jit(
        lambda kl_coef: shape_rewards(
            jnp.array([1.0, 3.0]), ones, zeros, mask, kl_coef=kl_coef
        )
    )
    rewards, kl = fn(jnp.array([0.5, 2.0], as_type))
    np.testing.assert_array_equal(rewards, [[-0.5, 0.5], [-2.0, 1.0]])
    np.testing.assert_array_equal(kl, ones)
    assert rewards.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (1, 7), (3, 7)])
def test_a_coefficient_is_one_number_or_one_per_row(batch, shape):
    with pytest.raises(AssertionError, match=r"shape|rank"):
        shape_rewards(*map(jnp.asarray, batch), kl_coef=jnp.full(shape, 0.1))


@pytest.mark.parametrize("shape", [(1,), (2,), (2, 1)])
def test_a_penalty_is_one_number(shape):
    with pytest.raises(AssertionError, match="rank"):
        penalize_missing_eos(
            jnp.array([0.5, 1.5]),
            jnp.array([True, False]),
            penalty=jnp.full(shape, 0.1),
        )
