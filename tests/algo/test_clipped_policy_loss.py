"""PPO's clipped surrogate by hand, against a loop and RLax, and far from ratio one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax.algo.policy_losses import clipped_policy_loss, gspo_loss, sapo_loss

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def arrays(rng, mask):
    """New and old log-probabilities and advantages, and the mask."""
    new, old, advantages = rng.normal(0, 0.5, (3, *mask.shape)).astype(np.float32)
    return jnp.array(new - 1), jnp.array(old - 1), jnp.array(advantages), mask


def policy_term(log_ratio, advantage, loss_fn=clipped_policy_loss, **options):
    """Loss and gradient in log ρ of one token."""

    def fn(x):
        zero, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
        return loss_fn(x + zero, zero, advantage + zero, mask, **options)[0, 0]

    return jax.value_and_grad(fn)(log_ratio)


def test_fixture_of_one_token():
    # F12: max(−e⁻¹, −0.8): below the range, and yet the unclipped branch.
    loss, grad = policy_term(-1.0, 1.0)
    np.testing.assert_allclose(loss, -0.36787944117144233, rtol=1e-6)
    np.testing.assert_allclose(grad, -0.36787944117144233, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [  # ε_low = 0.1, ε_high = 0.3; the gradient in log ρ is −ρ·A or 0
        (1.5, 2.0, -2.6, 0.0),  # above 1.3 and wanted: clipped
        (1.2, 2.0, -2.4, -2.4),  # within
        (0.5, 2.0, -1.0, -1.0),  # below, but wanted: learns
        (0.5, -2.0, 1.8, 0.0),  # below 0.9 and unwanted: clipped
        (1.5, -2.0, 3.0, 3.0),  # above, but unwanted: learns
    ],
)
def test_both_sides_of_an_asymmetric_clip(ratio, advantage, loss, grad):
    got = policy_term(np.log(ratio), advantage, clip_eps=0.1, clip_eps_high=0.3)
    np.testing.assert_allclose(got, (loss, grad), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [  # c = 3: acts where A < 0 and ρ > 3 alone
        (5.0, -2.0, 6.0, 0.0),
        (2.5, -2.0, 5.0, 5.0),
        (5.0, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_dual_clip(ratio, advantage, loss, grad):
    got = policy_term(np.log(ratio), advantage, dual_clip=3.0)
    np.testing.assert_allclose(got, (loss, grad), rtol=1e-5, atol=1e-7)


def test_a_wide_dual_clip_changes_nothing(arrays):
    np.testing.assert_array_equal(
        clipped_policy_loss(*arrays, dual_clip=1e6), clipped_policy_loss(*arrays)
    )


@pytest.mark.parametrize("clip_eps", [(0.2, None), (0.2, 0.2), (0.2, 0.28)])
def test_it_matches_a_loop(maybe_jit, arrays, clip_eps):
    low, high = clip_eps
    fn = functools.partial(clipped_policy_loss, clip_eps=low, clip_eps_high=high)
    *args, mask = arrays
    want = oracles.ppo_terms(*args, low, low if high is None else high)
    got = maybe_jit(fn)(*args, jnp.array(mask))
    np.testing.assert_allclose(got, np.where(mask, want, 0), **TOLERANCE)


def test_it_matches_rlax(arrays):
    rlax = pytest.importorskip("rlax")
    logprobs, old, advantages, _ = arrays
    real = jnp.ones(old.shape, bool)
    got = jnp.mean(clipped_policy_loss(logprobs, old, advantages, real, clip_eps=0.2))
    ratios = jnp.exp(logprobs - old)
    want = rlax.clipped_surrogate_pg_loss(ratios.ravel(), advantages.ravel(), 0.2)
    np.testing.assert_allclose(got, want, **TOLERANCE)


# ---- far from ratio one: e^1000 is infinite in float32, and 0 · inf is NaN ----


@pytest.mark.parametrize(
    ("advantage", "options", "loss"),
    [
        (2.0, {}, -2.4),  # clipped at 1.2
        (0.0, {}, 0.0),
        (2.0, {"clip_eps_high": 0.5}, -3.0),
        (2.0, {"dual_clip": 3.0}, -2.4),
        (-2.0, {"dual_clip": 3.0}, 6.0),  # c · 2
        (2.0, {"loss_fn": gspo_loss, "clip_eps": 0.1, "clip_eps_high": 0.3}, -2.6),
        (0.0, {"loss_fn": gspo_loss}, 0.0),
        (2.0, {"loss_fn": sapo_loss}, -8.0),  # an open gate: −4 / τ · 2
        (-2.0, {"loss_fn": sapo_loss, "tau_negative": 2.0}, 4.0),
    ],
)
def test_what_is_bounded_stays_finite_at_any_ratio(advantage, options, loss):
    value, grad = policy_term(1000.0, advantage, **options)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert grad == 0


def test_what_counts_without_bound_is_infinite():
    value, _ = policy_term(1000.0, -2.0)
    assert value == np.inf
    value, grad = policy_term(1000.0, -2.0, log_ratio_clamp=20.0)
    np.testing.assert_allclose(value, 2 * np.exp(20), rtol=1e-6)
    assert grad == 0
