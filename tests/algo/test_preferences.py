"""`preferences.py` by hand, against optax, and by symmetry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algo.preferences import preference_loss

CHOSEN, REJECTED = jnp.array([0.5, 2.0, -1.0]), jnp.array([0.5, 0.5, 1.5])


def test_by_hand(maybe_jit):
    # Differences 0, 1.5 and −2.5: −log σ = log(1 + e^−d)
    got = maybe_jit(preference_loss)(CHOSEN, REJECTED)
    want = [np.log(2), np.log1p(np.exp(-1.5)), np.log1p(np.exp(2.5))]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_margin_and_smoothing_by_hand(maybe_jit):
    margin = jnp.array([0.5, 0.0, 0.25])
    fn = functools.partial(preference_loss, label_smoothing=0.1)
    got = maybe_jit(fn)(CHOSEN, REJECTED, margin=margin)
    d = np.array([-0.5, 1.5, -2.75])
    want = 0.9 * np.log1p(np.exp(-d)) + 0.1 * np.log1p(np.exp(d))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_matches_optax(rng, smoothing):
    chosen, rejected = jnp.array(rng.normal(size=(2, 8)), jnp.float32)
    labels = jnp.full(8, 1.0 - smoothing)
    want = optax.sigmoid_binary_cross_entropy(chosen - rejected, labels)
    got = preference_loss(chosen, rejected, label_smoothing=smoothing)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_depends_on_the_difference_alone():
    got = preference_loss(CHOSEN + 3.5, REJECTED + 3.5)
    np.testing.assert_allclose(got, preference_loss(CHOSEN, REJECTED), rtol=1e-5)


def test_gradient_by_hand():
    # ∂L/∂s_chosen = −σ(−d) = −∂L/∂s_rejected; −½ at d = 0.
    grads = jax.grad(lambda *x: jnp.sum(preference_loss(*x)), argnums=(0, 1))
    chosen, rejected = grads(CHOSEN, REJECTED)
    want = -1 / (1 + np.exp([0, 1.5, -2.5]))
    np.testing.assert_allclose(chosen, want, rtol=1e-5)
    np.testing.assert_allclose(rejected, -want, rtol=1e-5)


def test_extremes_are_finite():
    far = jnp.array([1e4, -1e4])
    value, grad = jax.value_and_grad(lambda x: jnp.sum(preference_loss(x, -x)))(far)
    np.testing.assert_allclose(value, 2e4, rtol=1e-6)
    assert np.all(np.isfinite(grad))


def test_dtypes_and_wrong_options():
    low = preference_loss(CHOSEN.astype(jnp.bfloat16), REJECTED.astype(jnp.bfloat16))
    np.testing.assert_array_equal(low, preference_loss(CHOSEN, REJECTED))
    assert low.dtype == jnp.float32
    with pytest.raises(AssertionError, match="type"):
        preference_loss(jnp.array([1]), jnp.array([0]))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5: expected in"):
        preference_loss(CHOSEN, REJECTED, label_smoothing=0.5)
