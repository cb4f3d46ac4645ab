"""`covariance_losses.py` by hand; what all losses promise: `test_policy_losses.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.covariance_losses import clip_cov_loss, kl_cov_loss

KEY = jax.random.key(0)


def cov_row():
    """Four tokens at log π = −1 and −3, advantages ±1: c is 1 or −1 at each."""
    logprobs = jnp.array([[-1.0, -1.0, -3.0, -3.0]])  # mean −2
    advantages = jnp.array([[1.5, -0.5, -0.5, 1.5]])  # mean 0.5
    return logprobs, advantages, jnp.ones((1, 4), bool)


def test_clip_cov_by_hand():
    # c = (1, −1, 1, −1): of tokens 0 and 2, ⌊0.3 · 4⌋ = 1 is left out.
    logprobs, advantages, mask = cov_row()
    fn = functools.partial(clip_cov_loss, fraction=0.3, cov_range=(0.5, 5.0))
    draws = jax.vmap(lambda key: fn(logprobs, logprobs, advantages, mask, key=key))(
        jax.random.split(KEY, 200)
    )[:, 0]
    np.testing.assert_array_equal(draws[:, [1, 3]], np.tile([0.5, -1.5], (200, 1)))
    first, third = np.asarray(draws[:, 0]) == 0, np.asarray(draws[:, 2]) == 0
    assert np.all(first != third)
    assert 70 < first.sum() < 130  # a fair draw: 100 ± 7
    # All of them where there are fewer than the share, none outside the range, which
    # is exclusive.
    everyone = fn(logprobs, logprobs, advantages, mask, key=KEY, fraction=1.0)
    np.testing.assert_array_equal(everyone, [[0.0, 0.5, 0.0, -1.5]])
    plain = [[-1.5, 0.5, 0.5, -1.5]]
    for cov_range in [(1.0, 5.0), (-5.0, -1.0), (1.5, 5.0)]:
        got = fn(logprobs, logprobs, advantages, mask, key=KEY, cov_range=cov_range)
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("moved", "want"),
    [
        # Token 0 has ρ = e, A > 0: clipped by PPO at 1.2, so token 2 is the candidate.
        ([1.0, 0.0, 0.0, 0.0], [-1.8, 0.5, 0.0, -1.5]),
        # Token 2 has ρ = 1/e, A < 0: clipped by PPO at 0.8, so token 0 is.
        ([0.0, 0.0, -1.0, 0.0], [0.0, 0.5, 0.4, -1.5]),
    ],
)
def test_clip_cov_leaves_out_only_what_ppo_would_not_clip(seed, moved, want):
    logprobs, advantages, mask = cov_row()
    got = clip_cov_loss(
        *(logprobs, logprobs - jnp.array([moved]), advantages, mask),
        key=jax.random.key(seed),
        fraction=0.3,
        cov_range=(0.5, 5.0),
    )
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_clip_cov_draws_no_padding():
    # The mirror image: c = 1 at tokens 1 and 3. A pad that were read as A = log π = 0
    # would have c = (0 + 0.5) · (0 + 2) = 1 as well.
    logprobs, advantages, mask = (jnp.pad(x, ((0, 0), (0, 20))) for x in cov_row())
    fn = functools.partial(clip_cov_loss, fraction=0.3, cov_range=(0.5, 5.0))
    draws = jax.vmap(lambda key: fn(logprobs, logprobs, -advantages, mask, key=key))(
        jax.random.split(KEY, 20)
    )[:, 0, :4]
    np.testing.assert_array_equal(np.sum(draws == 0, axis=1), np.ones(20))


def test_kl_cov_by_hand():
    # c = (1, −1, 1, −1), two penalised: tokens 0 and 2. ρ = e^0.5 everywhere.
    logprobs, advantages, mask = cov_row()
    got = kl_cov_loss(
        *(logprobs, logprobs - 0.5, advantages, mask), fraction=0.5, kl_coef=3.0
    )
    plain = -np.exp(0.5) * np.array([[1.5, -0.5, -0.5, 1.5]])
    np.testing.assert_allclose(got, plain + np.array([[1.5, 0, 1.5, 0]]), rtol=1e-6)
    # A tie at the border: one of the two equals, the earlier.
    one = kl_cov_loss(*(logprobs, logprobs - 0.5, advantages, mask), fraction=0.25)
    np.testing.assert_allclose(one, plain + np.array([[0.5, 0, 0, 0]]), rtol=1e-6)


@pytest.mark.parametrize("fraction", [2e-4, 0.01, 0.07, 0.1, 0.3, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [10, 100, 700])
def test_the_share_is_exact(rng, fraction, tokens):
    # Two in three are real; equal advantages and log-probabilities tie all of them.
    mask = jnp.tile(jnp.array([True, True, False]), (1, tokens // 2))
    zeros = jnp.zeros(mask.shape)
    got = kl_cov_loss(zeros, zeros - 1.0, zeros, mask, fraction=fraction)
    want = max(int(fraction * tokens + 1e-9), 1)  # 0.3 · 10 and its like are whole
    assert np.count_nonzero(got) == want
