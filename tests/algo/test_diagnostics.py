"""`diagnostics.py` by hand, and by invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo import diagnostics

MASK = jnp.array([[True, True, True, False], [True, True, False, False]])
OLD = jnp.full((2, 4), -1.0)
# Ratios 1.5, 0.5, 1.4 | 0.5, 1.5; padding is garbage.
RATIOS = jnp.array([[1.5, 0.5, 1.4, np.nan], [0.5, 1.5, np.nan, 1e6]])
LOGPROBS = OLD + jnp.log(RATIOS)
ADVANTAGES = jnp.array([[2.0, 0.5, 1.5, np.nan], [-0.5, -2.5, 1.0, 1.0]])


def test_policy_diagnostics_by_hand(maybe_jit):
    # Σ (ρ − 1) = 0.5 − 0.5 + 0.4 − 0.5 + 0.5;   Π ρ = 1.5 · 0.5 · 1.4 · 0.5 · 1.5
    want = (0.4 - np.log(0.7875)) / 5
    got = maybe_jit(diagnostics.approx_kl)(LOGPROBS, OLD, MASK)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    got = maybe_jit(diagnostics.mean_ratio)(LOGPROBS, OLD, MASK)
    np.testing.assert_allclose(got, 5.4 / 5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (
            {"clip_eps": 0.2},
            3 / 5,
        ),  # ρ = 1.5 and 1.4 with A > 0, and ρ = 0.5 with A < 0
        ({"clip_eps": 0.2, "clip_eps_high": 0.6}, 1 / 5),
        ({"clip_eps": 0.6, "clip_eps_high": 0.2}, 2 / 5),
        ({"clip_eps": 0.6}, 0.0),
    ],
)
def test_clip_fraction_by_hand(maybe_jit, options, want):
    fn = functools.partial(diagnostics.clip_fraction, **options)
    got = maybe_jit(fn)(LOGPROBS, OLD, ADVANTAGES, MASK)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_value_clip_fraction_by_hand(maybe_jit):
    # Moves of +0.5, +0.5, +0.1 | −0.5 from 0.5; clipped when towards the return.
    values = jnp.array([[1.0, 1.0, 0.6, np.nan], [0.0, np.nan, 1.0, 9.0]])
    old = jnp.full((2, 4), 0.5)
    returns = jnp.array([[2.0, 0.0, 2.0, np.nan], [-1.0, np.inf, 1.0, 1.0]])
    mask = jnp.array([[True, True, True, False], [True, False, False, False]])
    fn = functools.partial(diagnostics.value_clip_fraction, clip_eps=0.2)
    got = maybe_jit(fn)(values, old, returns, mask)
    np.testing.assert_allclose(got, 2 / 4, rtol=1e-6)


def test_an_unchanged_policy():
    args = (OLD, OLD)
    assert diagnostics.approx_kl(*args, MASK) == 0
    assert diagnostics.mean_ratio(*args, MASK) == 1
    assert diagnostics.clip_fraction(*args, ADVANTAGES, MASK) == 0


def test_approx_kl_estimates_the_kl():
    # E over π_old of (ρ − 1) − log ρ, by enumeration: Σ π_old · log(π_old / π).
    old, new = np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.1, 0.4])
    terms = [
        diagnostics.approx_kl(
            jnp.array([[np.log(p)]], jnp.float32),
            jnp.array([[np.log(q)]], jnp.float32),
            jnp.array([[True]]),
        )
        for q, p in zip(old, new, strict=True)
    ]
    want = np.sum(old * np.log(old / new))
    np.testing.assert_allclose(np.dot(old, terms), want, rtol=1e-5)


def test_microbatches_add_up():
    for fn, extra in (
        (diagnostics.approx_kl, ()),
        (diagnostics.mean_ratio, ()),
        (diagnostics.clip_fraction, (ADVANTAGES,)),
    ):
        arrays = (LOGPROBS, OLD, *extra, MASK)
        parts = [fn(*(x[i : i + 1] for x in arrays), num_tokens=5) for i in range(2)]
        np.testing.assert_allclose(sum(parts), fn(*arrays), rtol=1e-5)


def test_explained_variance_by_hand(maybe_jit):
    # Returns 1.5, 2.5, 3.5, 4.5: variance 1.25. Errors 0.5, −0.5, −0.5, 0.5: 0.25.
    mask = jnp.array([[True, True, True, True, False]])
    returns = jnp.array([[1.5, 2.5, 3.5, 4.5, np.nan]])
    values = jnp.array([[1.0, 3.0, 4.0, 4.0, np.inf]])
    got = maybe_jit(diagnostics.explained_variance)(values, returns, mask)
    np.testing.assert_allclose(got, 0.8, rtol=1e-5)


def test_explained_variance_at_its_marks(rng, mask):
    returns = jnp.array(rng.normal(size=mask.shape), jnp.float32)
    mask = jnp.array(mask)
    fn = diagnostics.explained_variance
    assert fn(returns, returns, mask) == 1
    np.testing.assert_allclose(
        fn(jnp.full_like(returns, 7.3), returns, mask), 0, atol=1e-5
    )
    # A constant error is no error of the baseline: variance ignores it.
    np.testing.assert_allclose(fn(returns + 0.7, returns, mask), 1, rtol=1e-5)
    assert fn(-returns, returns, mask) < 0


@pytest.mark.parametrize("constant", [0.1, -17.3, 12345.678])
def test_explained_variance_without_variance_is_zero(constant):
    flat = jnp.full((1, 7), constant)
    mask = jnp.ones((1, 7), bool)
    values = jnp.linspace(0.3, 0.9, 7)[None, :]
    assert diagnostics.explained_variance(values, flat, mask) == 0
    assert diagnostics.explained_variance(values, flat, ~mask) == 0


def test_no_gradient():
    def total(x):
        return (
            diagnostics.approx_kl(x, OLD, MASK)
            + diagnostics.mean_ratio(x, OLD, MASK)
            + diagnostics.clip_fraction(x, OLD, OLD, MASK)
            + diagnostics.value_clip_fraction(x, OLD, OLD, MASK)
            + diagnostics.explained_variance(x, OLD * 0.5, MASK)
        )

    grad = jax.grad(total)(OLD + jnp.array([[0.1], [0.2]]))
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))
