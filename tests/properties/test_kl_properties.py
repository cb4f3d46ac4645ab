"""KL estimates: values and gradients by enumeration, clamps, and the adaptive β."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.strategies import CHECK, arrays

from rlhf_jax.algo.kl import adapt_kl_coef, kl_estimate

V = 5
ESTIMATORS = ["k1", "k2", "k3", "abs"]
SMALL = {"rtol": 1e-4, "atol": 1e-5}  # sums of V products, logits of size 2
logits = arrays((V,), bound=2.0)
estimate = {
    (estimator, straight): jax.jit(
        partial(kl_estimate, estimator=estimator, straight_through=straight)
    )
    for estimator in ESTIMATORS
    for straight in (False, True)
}


def expectations(theta, ref_theta):
    """By enumeration over the vocabulary, in float64."""
    return oracles.enumerate_kl(
        theta.astype(np.float64), np.exp(oracles.log_softmax(ref_theta))
    )


@pytest.fixture(scope="module")
def sampled_gradient():
    """E_a ∇ estimate(log π(a)): what minimising the estimate as a loss follows."""

    def gradient(estimator, straight, theta, ref_theta):
        probs = jax.nn.softmax(theta)  # of the tokens drawn: not differentiated

        def loss(theta):
            logprobs, ref = jax.nn.log_softmax(theta), jax.nn.log_softmax(ref_theta)
            kl = kl_estimate(
                logprobs, ref, estimator=estimator, straight_through=straight
            )
            return jnp.sum(jax.lax.stop_gradient(probs) * kl)

        return jax.grad(loss)(theta)

    return jax.jit(gradient, static_argnums=(0, 1))


# ---- values ----


@given(theta=logits, ref_theta=logits)
@CHECK
def test_expectations(theta, ref_theta):
    want = expectations(theta, ref_theta)
    logprobs = want["ell"] + oracles.log_softmax(ref_theta)
    pair = [np.float32(x) for x in (logprobs, oracles.log_softmax(ref_theta))]
    values = {
        "k1": want["kl"],
        "k2": want["E_k2"],
        "k3": want["kl"],
        "abs": (want["pi"] * np.abs(want["ell"])).sum(),
    }
    for estimator, value in values.items():
        for straight in (False, True):
            got = np.asarray(estimate[estimator, straight](*pair))
            np.testing.assert_allclose((want["pi"] * got).sum(), value, **SMALL)
            if estimator != "k1":
                assert got.min() >= (-1e-6 if straight else 0)


@given(logprobs=arrays((V,)))
@CHECK
def test_nothing_between_equal_policies(logprobs):
    for key, fn in estimate.items():
        np.testing.assert_array_equal(fn(logprobs, logprobs), 0, err_msg=str(key))


# ---- gradients ----


@given(theta=logits, ref_theta=logits)
@CHECK
def test_gradients_as_a_loss(sampled_gradient, theta, ref_theta):
    want = expectations(theta, ref_theta)
    zero = np.zeros(V)
    for estimator, gradient in (
        ("k1", zero),
        ("k2", want["grad_kl"]),
        ("k3", want["grad_kl_ref_pi"]),
    ):
        got = sampled_gradient(estimator, False, theta, ref_theta)
        np.testing.assert_allclose(got, gradient, **SMALL)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(theta=logits, ref_theta=logits)
@CHECK
def test_straight_through_has_the_gradient_of_the_kl(
    sampled_gradient, estimator, theta, ref_theta
):
    want = expectations(theta, ref_theta)["grad_kl"]
    got = sampled_gradient(estimator, True, theta, ref_theta)
    np.testing.assert_allclose(got, want, **SMALL)


@given(theta=logits, ref_theta=logits)
@CHECK
def test_only_k1_in_the_reward_descends_the_kl(theta, ref_theta):
    want = expectations(theta, ref_theta)
    probs, ref = want["pi"], oracles.log_softmax(ref_theta)
    pair = [np.float32(x) for x in (want["ell"] + ref, ref)]
    score = np.eye(V) - probs

    def in_reward(estimator):
        penalty = -np.asarray(estimate[estimator, False](*pair), np.float64)
        return (probs[:, None] * penalty[:, None] * score).sum(axis=0)

    np.testing.assert_allclose(in_reward("k1"), -want["grad_kl"], **SMALL)
    np.testing.assert_allclose(in_reward("k3"), want["E_reward_minus_k3"], **SMALL)
    if want["kl"] > 0.05:  # two policies that differ
        assert np.abs(in_reward("k3") + want["grad_kl"]).max() > 1e-3


# ---- extremes ----

CLAMPS = {
    "none": {},
    "log ratio": {"log_ratio_clamp": 20.0},
    "estimate": {"clamp": 10.0},
    "both": {"log_ratio_clamp": 20.0, "clamp": 10.0},
}


@pytest.fixture(scope="module")
def clamped():
    """`(estimator, straight, clamps, x) -> (values, gradient of their sum)`."""

    def compute(estimator, straight, clamps, x):
        fn = partial(
            kl_estimate,
            estimator=estimator,
            straight_through=straight,
            **CLAMPS[clamps],
        )

        def total(x):
            values = fn(x, jnp.zeros_like(x))
            return jnp.sum(values), values

        gradient, values = jax.grad(total, has_aux=True)(x)
        return values, gradient

    return jax.jit(compute, static_argnums=(0, 1, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clamps", CLAMPS)
@pytest.mark.parametrize("straight", [False, True])
@given(inner=st.lists(st.floats(-50, 50, width=16), min_size=4, max_size=4))
@settings(CHECK, max_examples=10)
def test_extremes_are_finite(clamped, dtype, clamps, straight, inner):
    x = jnp.array([50.0, -50.0, *inner], dtype)
    for estimator in ESTIMATORS:
        values, gradient = clamped(estimator, straight, clamps, x)
        assert values.dtype == jnp.float32 and gradient.dtype == x.dtype
        assert np.isfinite(values).all(), estimator
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), estimator


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(log_ratio=arrays((6,), bound=64.0))
@CHECK
def test_clamps_by_their_definition(clamped, estimator, log_ratio):
    bounded = np.clip(log_ratio.astype(np.float64), -20, 20)
    plain = {
        "k1": lambda x: x,
        "k2": lambda x: x**2 / 2,
        "k3": lambda x: np.expm1(-x) + x,
        "abs": np.abs,
    }[estimator]
    for clamps, want in (
        ("log ratio", plain(bounded)),
        ("both", np.clip(plain(bounded), -10, 10)),
    ):
        values, gradient = clamped(estimator, False, clamps, log_ratio)
        np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-5)
        acts = np.abs(log_ratio) > 20
        if clamps == "both":
            acts |= np.abs(plain(bounded)) > 10
        np.testing.assert_array_equal(np.asarray(gradient)[acts], 0)
        assert np.all(np.asarray(gradient)[~acts] != 0)
        assert np.abs(want).max() <= (10 if clamps == "both" else np.exp(20))


# ---- the adaptive coefficient ----

adapt = jax.jit(adapt_kl_coef)
positive = st.floats(1 / 64, 64, width=32)
episodes = st.integers(1, 100_000)


@given(
    coef=positive,
    kl=st.floats(-64, 64, width=32),
    target=positive,
    n=episodes,
    horizon=st.integers(1, 20_000),
)
@CHECK
def test_the_controller_is_the_published_one_while_that_is_sound(
    coef, kl, target, n, horizon
):
    got = adapt(coef, kl, target_kl=target, horizon=horizon, num_episodes=n)
    published = oracles.adapt(coef, kl, target, n, horizon)
    # Never less than a tenth, so never 0, and never a prize.
    np.testing.assert_allclose(got, max(published, coef * 0.1), rtol=1e-4)
    assert 0 < got <= coef * (1 + 0.2 * n / horizon) * (1 + 1e-5)


@given(coef=positive, target=positive, n=episodes)
@CHECK
def test_the_target_is_a_fixed_point(coef, target, n):
    got = adapt(coef, target, target_kl=target, horizon=10_000, num_episodes=n)
    assert got == np.float32(coef)


@given(
    coef=positive,
    pair=st.tuples(positive, positive).map(sorted),
    target=positive,
    n=episodes,
)
@CHECK
def test_more_kl_never_lowers_the_coefficient(coef, pair, target, n):
    lower, upper = (
        adapt(coef, kl, target_kl=target, horizon=10_000, num_episodes=n) for kl in pair
    )
    assert lower <= upper
    assert lower <= np.float32(coef) or pair[0] > target
    assert upper >= np.float32(coef) or pair[1] < target
