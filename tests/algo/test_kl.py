"""`kl.py` at points, by enumeration over a vocabulary, and by invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.algo.kl import adapt_kl_coef, kl_estimate

ESTIMATORS = ["k1", "k2", "k3"]
# F5.
LOGITS = np.array([0.5, -0.2, 0.1])
REFERENCE = np.array([0.2, 0.5, 0.3])
KL = 0.2165696755989831
GRAD_KL = [0.2859230530118799, -0.22841688248987327, -0.057506170522006635]
GRAD_KL_REVERSE = [0.26148762338872567, -0.2708320283435341, 0.009344404954808372]


@pytest.mark.parametrize(
    ("log_ratio", "k1", "k2", "k3"),
    [  # F6
        (-0.1, -0.1, 0.005, 0.005170918075647624),
        (-1.0, -1.0, 0.5, 0.7182818284590453),
        (-5.0, -5.0, 12.5, 142.4131591025766),
        (-10.0, -10.0, 50.0, 22015.465794806718),
        (-20.0, -20.0, 200.0, 485165174.4097903),
    ],
)
def test_values_at_points(maybe_jit, log_ratio, k1, k2, k3):
    for estimator, want in zip(ESTIMATORS, (k1, k2, k3), strict=True):
        fn = maybe_jit(functools.partial(kl_estimate, estimator=estimator))
        got = fn(jnp.array([[log_ratio]]), jnp.array([[0.0]]))
        np.testing.assert_allclose(got, [[want]], rtol=1e-5)


def policy():
    logprobs = jax.nn.log_softmax(jnp.array(LOGITS, jnp.float32))
    return logprobs, jnp.log(jnp.array(REFERENCE, jnp.float32))


def test_expectations_by_enumeration():
    logprobs, ref = policy()
    probs = jnp.exp(logprobs)
    want = {"k1": KL, "k2": 0.23120486420870676, "k3": KL}
    for estimator in ESTIMATORS:
        got = jnp.sum(probs * kl_estimate(logprobs, ref, estimator=estimator))
        np.testing.assert_allclose(got, want[estimator], rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "want"),
    [("k1", [0, 0, 0]), ("k2", GRAD_KL), ("k3", GRAD_KL_REVERSE)],
)
def test_gradients_as_a_loss(estimator, want):
    probs = jnp.exp(policy()[0])  # of the tokens drawn; sampling is not differentiated

    def expected(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(probs * kl_estimate(logprobs, policy()[1], estimator=estimator))

    grad = jax.grad(expected)(jnp.array(LOGITS, jnp.float32))
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)


def test_only_k1_in_the_reward_descends_the_kl():
    logprobs, ref = policy()
    probs = jnp.exp(logprobs)
    scores = jnp.eye(3) - probs[None, :]  # row a: ∇ log π(a)
    for estimator in ESTIMATORS:
        weight = probs * -kl_estimate(logprobs, ref, estimator=estimator)
        grad = np.sum(weight[:, None] * scores, axis=0)
        descends = np.allclose(grad, -np.array(GRAD_KL), rtol=1e-5, atol=1e-6)
        assert descends == (estimator == "k1")


def test_fixture_agrees_with_its_oracle():
    want = oracles.enumerate_kl(LOGITS, REFERENCE)
    np.testing.assert_allclose(want["kl"], KL)
    np.testing.assert_allclose(want["E_k3"], KL)
    np.testing.assert_allclose(want["grad_kl"], GRAD_KL)
    np.testing.assert_allclose(want["E_reward_minus_k1"], np.negative(GRAD_KL))


@given(log_ratio=st.floats(-30, 30, width=32))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_k2_and_k3_are_never_negative(log_ratio):
    x, zero = jnp.array([[log_ratio]], jnp.float32), jnp.zeros((1, 1))
    assert kl_estimate(x, zero, estimator="k2") >= 0
    assert kl_estimate(x, zero, estimator="k3") >= 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_give_exactly_zero(estimator, rng):
    x = jnp.array(rng.normal(size=(2, 3)), jnp.float32)
    np.testing.assert_array_equal(kl_estimate(x, x, estimator=estimator), 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_are_finite(estimator, dtype):
    x = jnp.array([[50.0, -50.0]], dtype)
    fn = functools.partial(kl_estimate, estimator=estimator)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(fn(x, jnp.zeros_like(x))))(x)
    assert value.dtype == jnp.float32
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_k3_keeps_its_digits_near_zero():
    # ½ℓ² to first order; exp(-ℓ) - 1 + ℓ in float32 would be 0 or 6e-8 here.
    got = kl_estimate(jnp.array([[1e-4]]), jnp.array([[0.0]]), estimator="k3")
    np.testing.assert_allclose(got, [[5e-9]], rtol=5e-3)


def test_refuses_integers_and_unknown_estimators():
    x = jnp.zeros((1, 2))
    with pytest.raises(AssertionError, match="type"):
        kl_estimate(x.astype(jnp.int32), x)
    with pytest.raises(ValueError, match="estimator='kl'"):
        kl_estimate(x, x, estimator="kl")


def test_controller_fixture(maybe_jit):
    # F9: error clipped to 0.2, times 512 / 10000.
    fn = maybe_jit(functools.partial(adapt_kl_coef, target_kl=6.0, horizon=10000))
    np.testing.assert_allclose(fn(0.15, 12.0, num_episodes=512), 0.151536, rtol=1e-6)
    np.testing.assert_allclose(fn(0.15, 6.0, num_episodes=512), 0.15, rtol=1e-6)
    assert fn(0.15, 0.0, num_episodes=60000) > 0  # −0.03 by the bare formula


@pytest.mark.parametrize("observed", [0.0, 0.3, 5.5, 6.0, 6.6, 1e6])
@pytest.mark.parametrize("num_episodes", [1, 512, 40000])
def test_controller_matches_the_published_formula(observed, num_episodes):
    got = adapt_kl_coef(
        jnp.float32(0.2),
        jnp.float32(observed),
        target_kl=6.0,
        horizon=10000,
        num_episodes=num_episodes,
    )
    want = oracles.adapt(0.2, observed, 6.0, num_episodes, 10000)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("num_episodes", [512, 45000, 10**7])
def test_controller_is_monotone_bounded_and_positive(num_episodes):
    kl = jnp.linspace(0, 20, 81)
    beta = adapt_kl_coef(
        0.15, kl, target_kl=6.0, horizon=10000, num_episodes=num_episodes
    )
    assert np.all(np.diff(beta) >= 0)
    assert np.all(beta >= 0.15 * 0.1 * (1 - 1e-6))
    assert np.all(beta <= 0.15 * (1 + 0.2 * num_episodes / 10000) * (1 + 1e-6))
