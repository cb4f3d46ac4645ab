"""Rotary positions by hand; test_family_parity.py has them against PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Rope,
    YarnRopeScaling,
    rotary,
    rotate,
)

# Heads of 4 dimensions at base 100: θ_0 = 1, θ_1 = 100^(-2/4) = 0.1.


def angles(rope, positions, head_dim=4):
    cos, sin = rotary(rope, head_dim, jnp.array(positions))
    return np.arctan2(sin, cos)


def test_plain():
    got = angles(Rope(theta=100.0), [[0, 1, 3]])
    want = [[[0.0, 0.0], [1.0, 0.1], [3.0, 0.3]]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_linear_divides_positions():
    rope = Rope(theta=100.0, scaling=LinearRopeScaling(factor=4.0))
    got = angles(rope, [[2, 4]])
    np.testing.assert_allclose(got, [[[0.5, 0.05], [1.0, 0.1]]], rtol=1e-5)


def test_dynamic_depends_on_each_row_alone():
    scaling = DynamicRopeScaling(factor=2.0, original_max_positions=2)
    got = angles(Rope(theta=100.0, scaling=scaling), [[0, 1], [2, 3]])
    # Row 0 is of 2 tokens: plain. Row 1 is of 4: θ' = 100 · (2·4/2 − 1)^(4/2) = 900,
    # so θ'_1 = 900^(-1/2) = 1/30.
    np.testing.assert_allclose(got[0], [[0.0, 0.0], [1.0, 0.1]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], [[2.0, 2 / 30], [3.0, 3 / 30]], rtol=1e-5)


def test_llama3_keeps_fast_and_stretches_slow_dimensions():
    scaling = Llama3RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=32,
    )
    got = angles(Rope(theta=100.0, scaling=scaling), [[1]])
    # In 32 tokens: θ_0 turns 32/2π = 5.09 times, above 4: kept. θ_1 turns 0.51 times,
    # below 1: divided by 8.
    np.testing.assert_allclose(got, [[[1.0, 0.1 / 8]]], rtol=1e-5)


def test_yarn_blends_by_dimension_and_sharpens():
    scaling = YarnRopeScaling(
        factor=4.0,
        original_max_positions=100,
        attention_factor=1.5,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
    )
    cos, sin = rotary(Rope(theta=100.0, scaling=scaling), 4, jnp.array([[1]]))
    np.testing.assert_allclose(cos**2 + sin**2, np.full((1, 1, 2), 2.25), rtol=1e-5)
    # Dimension that turns n times: 4 · ln(100 / 2πn) / (2 · ln 100); for 32 times
    # −0.303, so 0, for once 1.2018. Ramp of dimension 1: 1/1.2018 = 0.8321, so
    # θ'_1 = 0.1 · (0.8321/4 + 0.1679) = 0.037593.
    got = np.arctan2(sin, cos)
    np.testing.assert_allclose(got, [[[1.0, 0.037593]]], rtol=1e-4)


def test_longrope_chooses_by_length():
    scaling = LongRopeScaling(
        short_factor=(1.0, 2.0),
        long_factor=(4.0, 5.0),
        original_max_positions=3,
        attention_factor=1.0,
    )
    got = angles(Rope(theta=100.0, scaling=scaling), [[1, 2], [2, 3]])
    np.testing.assert_allclose(got[0], [[1.0, 0.05], [2.0, 0.1]], rtol=1e-5)
    np.testing.assert_allclose(got[1], [[0.5, 0.04], [0.75, 0.06]], rtol=1e-5)


def test_only_a_share_of_each_head_is_turned():
    rope = Rope(theta=100.0, share=0.5)
    cos, sin = rotary(rope, 8, jnp.array([[1]]))
    assert cos.shape == (1, 1, 2)
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    turned = rotate(x, cos, sin)[0, 0, 0]
    # Pairs (1, 3) by 1 and (2, 4) by 0.1; 5 … 8 stay.
    c, s, c1, s1 = np.cos(1.0), np.sin(1.0), np.cos(0.1), np.sin(0.1)
    want = [c - 3 * s, 2 * c1 - 4 * s1, 3 * c + s, 4 * c1 + 2 * s1, 5, 6, 7, 8]
    np.testing.assert_allclose(turned, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turning_keeps_dtype_and_length(dtype):
    x = jnp.ones((1, 2, 3, 4), dtype)
    cos, sin = rotary(Rope(), 4, jnp.array([[0, 5, 9]]))
    turned = rotate(x, cos, sin)
    assert turned.dtype == dtype
    norms = jnp.sum(turned.astype(jnp.float32) ** 2, axis=-1)
    np.testing.assert_allclose(norms, np.full((1, 2, 3), 4.0), rtol=2e-2)
