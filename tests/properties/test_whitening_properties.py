"""Whitening: mean 0, variance 1, and what must not move it."""

from functools import partial

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import CHECK, TOLERANCE, B, T, any_masks, arrays

from rlhf_jax.algo.masking import masked_whiten

FORMS = [(center, ddof) for center in (True, False) for ddof in (0, 1)]
whiten = {
    (center, ddof, shards): jax.jit(
        partial(masked_whiten, center=center, ddof=ddof, shards=shards)
    )
    for center, ddof in FORMS
    for shards in (1, 2, B)
}
EACH_FORM = pytest.mark.parametrize(("center", "ddof"), FORMS)
values = arrays((B, T))


def whitened(x, m, ddof, center):
    """By the definition in float64; fewer than two tokens have no variance."""
    out = np.zeros(x.shape)
    real = x[m].astype(np.float64)
    if len(real) > 1:
        out[m] = oracles.whiten(real, ddof, center=center)
    elif len(real) == 1:
        out[m] = 0 if center else real
    return out


@EACH_FORM
@given(x=values, mask=any_masks)
@CHECK
def test_matches_the_definition(center, ddof, x, mask):
    got = whiten[center, ddof, 1](x, mask)
    np.testing.assert_allclose(got, whitened(x, mask, ddof, center), **TOLERANCE)


@pytest.mark.parametrize("shards", [2, B])
@EACH_FORM
@given(x=values, mask=any_masks)
@CHECK
def test_every_shard_by_itself(center, ddof, shards, x, mask):
    got = whiten[center, ddof, shards](x, mask)
    parts = zip(np.split(x, shards), np.split(mask, shards), strict=True)
    want = np.concatenate([whitened(*part, ddof, center) for part in parts])
    np.testing.assert_allclose(got, want, **TOLERANCE)


@EACH_FORM
@given(x=values, mask=any_masks)
@CHECK
def test_moments(center, ddof, x, mask):
    real = x[mask].astype(np.float64)
    y = np.asarray(whiten[center, ddof, 1](x, mask))[mask].astype(np.float64)
    if len(real):
        np.testing.assert_allclose(y.mean(), 0 if center else real.mean(), atol=1e-5)
    if len(np.unique(real)) > 1:
        np.testing.assert_allclose(y.var(ddof=ddof), 1, rtol=1e-4)


@given(
    x=values,
    mask=any_masks,
    scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]),
    shift=st.integers(-64, 64).map(lambda k: k / 4),
)
@CHECK
def test_scale_and_shift_of_the_input_do_not_matter(x, mask, scale, shift):
    # Exact in float32. The variance has to be far above eps: 0.25 · 1/32 at least.
    moved = (scale * x + shift).astype(np.float32)
    got, want = (np.asarray(whiten[True, 0, 1](y, mask)) for y in (moved, x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@EACH_FORM
@given(constant=st.floats(-1e6, 1e6, width=32, allow_subnormal=False), mask=any_masks)
@CHECK
def test_a_constant_has_nothing_to_scale(center, ddof, constant, mask):
    got = whiten[center, ddof, 1](np.full((B, T), constant, np.float32), mask)
    want = np.where(mask, 0 if center else constant, 0)
    # The last digit of the mean, divided by √eps = 1e-4, is what may be left.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-3)


@EACH_FORM
@given(x=values, place=st.tuples(st.integers(0, B - 1), st.integers(0, T - 1)))
@CHECK
def test_a_single_token_is_finite(center, ddof, x, place):
    mask = np.zeros((B, T), bool)
    mask[place] = True
    got = np.asarray(whiten[center, ddof, 1](x, mask))
    np.testing.assert_allclose(got[place], 0 if center else x[place], **TOLERANCE)
    assert np.count_nonzero(got) == (0 if center else 1)


@given(x=values, mask=any_masks)
@CHECK
def test_one_shard_per_row_sees_nothing_of_the_others(x, mask):
    got = np.asarray(whiten[True, 0, B](x, mask))
    for b in range(B):
        alone = np.where(np.arange(B)[:, None] == b, mask, False)
        want = np.asarray(whiten[True, 0, 1](x, alone))
        np.testing.assert_allclose(got[b], want[b], **TOLERANCE)


@pytest.mark.parametrize("shards", [0, 3, 8, -1])
def test_shards_must_divide_the_batch(shards):
    x = np.ones((B, T), np.float32)
    with pytest.raises(
        ValueError, match=rf"shards={shards}: .*divisor of the {B} rows"
    ):
        masked_whiten(x, x > 0, shards=shards)
