"""`length_penalties.py` by hand."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.scores import soft_overlong_penalty


def test_fixture_of_five_lengths(maybe_jit):
    # L = 100, B = 20: nothing to pay until 80, then −(l − 80) / 20, and −1 past 100.
    fn = maybe_jit(functools.partial(soft_overlong_penalty, limit=100, buffer=20))
    got = fn(jnp.array([80, 85, 90, 100, 101]))
    np.testing.assert_array_equal(got, [0.0, -0.25, -0.5, -1.0, -1.0])
    assert got.dtype == jnp.float32


def test_beyond_the_ramp_it_is_flat(maybe_jit):
    fn = maybe_jit(functools.partial(soft_overlong_penalty, limit=7, buffer=3))
    got = fn(jnp.arange(11))
    # −(l − 4) / 3 from 4 to 7
    want = [0, 0, 0, 0, 0, -1 / 3, -2 / 3, -1, -1, -1, -1]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_buffer_as_long_as_the_limit_starts_at_the_first_token():
    got = soft_overlong_penalty(jnp.array([0, 1, 4, 5]), limit=4, buffer=4)
    np.testing.assert_array_equal(got, [0.0, -0.25, -1.0, -1.0])


def test_lengths_of_dapo():
    lengths = jnp.array([16_384, 18_432, 20_480])
    got = soft_overlong_penalty(lengths, limit=20_480, buffer=4_096)
    np.testing.assert_array_equal(got, [0.0, -0.5, -1.0])


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_cannot_be_is_refused(buffer):
    with pytest.raises(ValueError, match=f"buffer={buffer}: expected in 1 … limit=100"):
        soft_overlong_penalty(jnp.array([3]), limit=100, buffer=buffer)


def test_lengths_must_be_a_vector_of_integers():
    with pytest.raises(AssertionError, match="type"):
        soft_overlong_penalty(jnp.array([3.0]), limit=100, buffer=20)
    with pytest.raises(AssertionError, match="rank"):
        soft_overlong_penalty(jnp.array([[3]]), limit=100, buffer=20)
