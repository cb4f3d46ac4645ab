"""Group baselines: sums of 0, leave-one-out by its definition, no spikes."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import CHECK, arrays

from rlhf_jax.algo.group_advantages import group_advantages

N = 12
scores = arrays((N,))
groups = st.lists(st.integers(-2, 3), min_size=N, max_size=N).map(
    lambda ids: np.array(ids, np.int32)
)
BASELINES, SCALES = ["mean", "leave-one-out"], ["none", "std", "batch-std"]
advantages = {
    (baseline, scale): jax.jit(
        partial(group_advantages, baseline=baseline, scale=scale, eps=0.01)
    )
    for baseline in BASELINES
    for scale in SCALES
}


def expected(s, ids, baseline, scale, eps=0.01):
    """One answer at a time."""
    s, out = s.astype(np.float64), np.zeros(len(s))
    for i in range(len(s)):
        group = [j for j in range(len(s)) if ids[j] == ids[i]]
        if len(group) == 1:
            continue  # nothing to compare with: 0
        if baseline == "leave-one-out":
            out[i] = s[i] - np.mean([s[j] for j in group if j != i])
        else:
            out[i] = s[i] - np.mean([s[j] for j in group])
        if scale != "none":
            of = group if scale == "std" else range(len(s))
            out[i] /= np.std([s[j] for j in of], ddof=1) + eps
    return out


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(s=scores, ids=groups)
@CHECK
def test_matches_the_definition(baseline, scale, s, ids):
    got = np.asarray(advantages[baseline, scale](s, ids))
    np.testing.assert_allclose(
        got, expected(s, ids, baseline, scale), rtol=1e-4, atol=1e-5
    )
    for group in np.unique(ids):
        np.testing.assert_allclose(got[ids == group].sum(), 0, atol=1e-4)


@given(s=scores, ids=groups)
@CHECK
def test_leave_one_out_is_a_larger_mean_baseline(s, ids):
    size = (ids[:, None] == ids).sum(axis=1)
    mean, leave_one_out = (
        np.asarray(advantages[baseline, "none"](s, ids)) for baseline in BASELINES
    )
    factor = size / np.maximum(size - 1, 1)
    np.testing.assert_allclose(leave_one_out, factor * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@given(
    s=scores,
    ids=groups,
    order=st.permutations(range(N)),
    shift=arrays((6,), bound=32.0),
)
@CHECK
def test_order_names_and_level_of_a_group_do_not_matter(scale, s, ids, order, shift):
    fn = advantages["leave-one-out", scale]
    want = np.asarray(fn(s, ids))
    turned = np.asarray(fn(s[order], (40 - 3 * ids)[order]))
    np.testing.assert_allclose(turned, want[order], rtol=1e-5, atol=1e-5)
    if scale != "batch-std":  # σ of the batch sees the level of each group
        moved = np.asarray(fn(s + shift[ids + 2], ids))
        np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["std", "batch-std"])
@given(steps=st.lists(st.integers(-13, 13), min_size=N, max_size=N))
@CHECK
def test_scores_that_agree_to_four_decimals_do_not_spike(scale, steps):
    # Float32 steps by 7.6e-6 at 100: differences of up to 1e-4 are a few of those,
    # which E s² − μ² could not tell from rounding.
    s = (100 + np.array(steps) * 2.0**-17).astype(np.float32)
    ids = np.repeat(np.arange(3, dtype=np.int32), 4)
    got = np.asarray(
        group_advantages(s, ids, scale=scale, baseline="leave-one-out", eps=1e-4)
    )
    want = expected(s, ids, "leave-one-out", scale, eps=1e-4)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(got).max() < 4
