"""`group_advantages.py` by hand and by identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.algo.group_advantages import group_advantages

SCORES = [0.5, 1.5, 2.5, 3.5, -0.25, 0.25]
IDS = [7, 7, 7, 7, -1, -1]
# Means 2 and 0. Squares 1.5² + 0.5² + 0.5² + 1.5² = 5 and 2 · 0.25² = 0.125.
CENTRED = np.array([-1.5, -0.5, 0.5, 1.5, -0.25, 0.25])


def expected(ddof, scale, leave_one_out):
    size = np.array([4] * 4 + [2] * 2)
    sigma = np.sqrt(np.array([5] * 4 + [0.125] * 2) / (size - ddof))
    out = CENTRED * (size / (size - 1) if leave_one_out else 1)
    return out / (sigma + 0.01) if scale == "std" else out


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_by_hand(maybe_jit, ddof, scale, baseline):
    fn = functools.partial(
        group_advantages, scale=scale, baseline=baseline, ddof=ddof, eps=0.01
    )
    got = maybe_jit(fn)(jnp.array(SCORES), jnp.array(IDS))
    want = expected(ddof, scale, baseline == "leave-one-out")
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_scaled_by_the_batch_by_hand(maybe_jit, ddof, baseline):
    # All six: sum 8, squares 0.25 + 2.25 + 6.25 + 12.25 + 2 · 0.0625 = 21.125,
    # deviations squared 21.125 − 64 / 6 = 10.4583.
    fn = functools.partial(
        group_advantages, scale="batch-std", baseline=baseline, ddof=ddof, eps=0.01
    )
    got = maybe_jit(fn)(jnp.array(SCORES), jnp.array(IDS))
    centred = expected(ddof, "none", baseline == "leave-one-out")
    sigma = np.sqrt((21.125 - 64 / 6) / (6 - ddof))
    np.testing.assert_allclose(got, centred / (sigma + 0.01), rtol=1e-5)


def test_the_batchs_deviation_at_a_large_magnitude(rng):
    # Float32 steps by 2⁻⁷ at 1e5, and so may its mean be wrong by about σ.
    steps = rng.integers(-2, 3, 21)
    scores = jnp.array(1e5 + steps / 128, jnp.float32)
    got = group_advantages(scores, 3, scale="batch-std", baseline="mean", eps=1e-6)
    groups = (steps / 128).reshape(7, 3)
    centred = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    np.testing.assert_allclose(
        got, centred / (groups.std(ddof=1) + 1e-6), rtol=1e-4, atol=1e-4
    )


def test_one_group_is_a_batch():
    scores = jnp.array(SCORES)
    np.testing.assert_allclose(
        group_advantages(scores, 6, scale="batch-std"),
        group_advantages(scores, 6, scale="std"),
        rtol=1e-5,
    )


def test_without_a_baseline_scores_stay_as_they_are(maybe_jit):
    fn = functools.partial(group_advantages, scale="none", baseline="none")
    got = maybe_jit(fn)(jnp.array(SCORES, jnp.bfloat16), jnp.array(IDS))
    np.testing.assert_array_equal(got, SCORES)
    assert got.dtype == jnp.float32


def test_leave_one_out_is_the_mean_of_the_others():
    got = group_advantages(
        jnp.array(SCORES), jnp.array(IDS), scale="none", baseline="leave-one-out"
    )
    # 0.5 − (1.5 + 2.5 + 3.5) / 3 = −2;   −0.25 − 0.25 = −0.5
    np.testing.assert_allclose(got[0], -2.0, rtol=1e-6)
    np.testing.assert_allclose(got[4], -0.5, rtol=1e-6)


@pytest.mark.parametrize("scale", ["std", "batch-std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_size_and_ids_agree(maybe_jit, rng, scale, baseline):
    scores = jnp.array(rng.normal(size=12), jnp.float32)
    ids = np.repeat([3, 9, 5], 4)
    fn = functools.partial(group_advantages, scale=scale, baseline=baseline)
    by_size = maybe_jit(functools.partial(fn, groups=4))(scores)
    by_id = maybe_jit(fn)(scores, jnp.array(ids))
    np.testing.assert_allclose(by_size, by_id, rtol=1e-5, atol=1e-6)
    order = rng.permutation(12)
    shuffled = maybe_jit(fn)(scores[order], jnp.array(ids[order]))
    np.testing.assert_allclose(shuffled, by_id[order], rtol=1e-5, atol=1e-6)
    sums = np.asarray(by_size).reshape(3, 4).sum(axis=1)
    np.testing.assert_allclose(sums, np.zeros(3), atol=1e-5)


@given(scale=st.floats(0.5, 20), shift=st.floats(-20, 20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_standardised_scores_are_affine_invariant(scale, shift):
    scores = jnp.array([0.3, -1.2, 2.2, 0.9, 1.7, -0.4])
    want = group_advantages(scores, 3, scale="std", eps=0.0)
    got = group_advantages(scale * scores + shift, 3, scale="std", eps=0.0)
    # A shift by 20 costs the input a decimal of precision.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["std", "batch-std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_nothing_to_compare_with_gives_zero(scale, baseline):
    fn = functools.partial(group_advantages, scale=scale, baseline=baseline)
    np.testing.assert_array_equal(fn(jnp.array([0.7, -3.3]), 1), [0.0, 0.0])
    ids = jnp.array([4, 8, 8])
    np.testing.assert_array_equal(fn(jnp.array([0.7, 0.1, 0.1]), ids), [0.0] * 3)


@pytest.mark.parametrize("constant", [0.1, -17.3, 12345.678])
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("scale", ["std", "batch-std"])
def test_equal_scores_give_exactly_zero(constant, size, scale):
    got = group_advantages(jnp.full(2 * size, constant), size, scale=scale)
    np.testing.assert_array_equal(got, np.zeros(2 * size))


@pytest.mark.parametrize("scale", ["std", "batch-std", "none"])
def test_nearly_equal_scores_do_not_spike(scale):
    # σ = 1.1e-4 at magnitude 100, where float32 steps by 8e-6: E s² − μ² is noise.
    scores = jnp.array([100.0001, 100.0002, 100.0, 100.0001])
    got = group_advantages(scores, 4, scale=scale, baseline="leave-one-out")
    assert np.all(np.abs(got) < 2)


def test_half_precision_and_integers():
    got = group_advantages(jnp.array([0.5, 1.5], jnp.bfloat16), 2)
    np.testing.assert_array_equal(got, [-1.0, 1.0])
    assert got.dtype == jnp.float32
    with pytest.raises(AssertionError, match="type"):
        group_advantages(jnp.array([1, 2]), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4}, "group size 4: expected a divisor of the 6"),
        ({"groups": 0}, "group size 0"),
        ({"groups": 3, "scale": "batch"}, "scale='batch'"),
        ({"groups": 3, "baseline": "loo"}, "baseline='loo'"),
        ({"groups": 3, "scale": "std", "baseline": "none"}, "scale='std': expected"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.array(SCORES), **options)


@pytest.mark.parametrize("scale", ["std", "batch-std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
@pytest.mark.parametrize("scores", [[0.5, 1.5, 2.5, 2.5], [0.7] * 4])
def test_no_gradient_flows_through_it(scale, baseline, scores):
    # Weighted, for the sum over a group is constant anyway.
    def total(scores):
        out = group_advantages(scores, 2, scale=scale, baseline=baseline)
        return jnp.sum(jnp.array([1.0, 2.0, 3.0, 4.0]) * out)

    np.testing.assert_array_equal(jax.grad(total)(jnp.array(scores)), np.zeros(4))


def test_scores_without_a_baseline_have_no_gradient_either():
    def total(scores):
        return jnp.sum(group_advantages(scores, 2, scale="none", baseline="none"))

    np.testing.assert_array_equal(jax.grad(total)(jnp.array(SCORES)), np.zeros(6))


def test_a_numpy_group_size_by_hand(maybe_jit):
    # Means 1, 3 and 0.
    fn = functools.partial(group_advantages, groups=np.int64(2), baseline="mean")
    got = maybe_jit(fn)(jnp.array(SCORES))
    np.testing.assert_array_equal(got, [-0.5, 0.5, -0.5, 0.5, -0.25, 0.25])
    with pytest.raises(ValueError, match="group size 4: expected a divisor of the 6"):
        group_advantages(jnp.array(SCORES), np.int64(4))
