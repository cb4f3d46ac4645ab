"""`off_policy.py`: ratios of tokens and of answers by hand and by loops."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.off_policy import sampler_ratio, sampler_weights

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    ("level", "want"),
    [("token", 1.0100502), ("geometric", 1.0100502), ("sequence", 2.7182818)],
)
def test_a_hundred_tokens_that_are_each_off_by_a_hundredth(maybe_jit, level, want):
    # e^0.01 at each; their product is e^(100 · 0.01) = e.
    sampler = jnp.full((1, 100), -1.5)
    mask = jnp.ones((1, 100), bool)
    fn = maybe_jit(partial(sampler_ratio, level=level))
    got = fn(sampler + 0.01, sampler, mask)
    np.testing.assert_allclose(got, np.full((1, 100), want), rtol=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_answers_by_loops(rng, mask, level):
    old, sampler = rng.normal(-2, 0.3, (2, *mask.shape)).astype(np.float32)
    want = np.ones(mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        product, count = 1.0, 0
        for k in range(mask.shape[1]):
            if mask[b, k] and (level != "token" or k == t):
                product *= math.exp(float(old[b, k]) - float(sampler[b, k]))
                count += 1
        want[b, t] = product ** (1 / count) if level == "geometric" else product
    dirty = [jnp.where(mask, x, jnp.nan) for x in (old, sampler)]
    got = sampler_ratio(*dirty, jnp.array(mask), level=level)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize(
    ("level", "truncated", "masked"),
    [  # ratios of ¼, 4 and 1; their product is 1, their geometric mean too
        ("token", [0.25, 2.0, 1.0], [0.25, 0.0, 1.0]),
        ("sequence", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ("geometric", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ],
)
def test_tokens_that_make_up_for_each_other(level, truncated, masked):
    old = jnp.log(jnp.array([[0.25, 4.0, 1.0]]))
    args = (old, jnp.zeros((1, 3)), jnp.ones((1, 3), bool))
    for mode, want in (("truncate", truncated), ("mask", masked)):
        got = sampler_weights(*args, mode=mode, level=level)
        np.testing.assert_allclose(got, [want], **TOLERANCE)


@pytest.mark.parametrize(
    ("level", "lowest", "largest"),
    [("token", 0.0, 2.0), ("sequence", 0.0, 3.0), ("geometric", 0.99, 1.01)],
)
def test_each_level_has_bounds_of_its_own(level, lowest, largest):
    # An answer of two tokens, each so far off, at and around either bound.
    for ratio in (0.5, 0.98, 1.0, 1.02, 1.9, 2.1, 2.9, 3.1):
        per_token = math.sqrt(ratio) if level == "sequence" else ratio
        old = jnp.full((1, 2), math.log(per_token))
        args = (old, jnp.zeros((1, 2)), jnp.ones((1, 2), bool))
        bounded = min(max(ratio, lowest), largest)
        got = sampler_weights(*args, level=level)
        np.testing.assert_allclose(got, [[bounded] * 2], **TOLERANCE)
        got = sampler_weights(*args, level=level, mode="mask")
        want = ratio if lowest <= ratio <= largest else 0.0
        np.testing.assert_allclose(got, [[want] * 2], **TOLERANCE)
        # Bounds that are given take their place, one by one.
        got = sampler_weights(*args, level=level, lower_bound=0.75)
        np.testing.assert_allclose(got, [[min(max(ratio, 0.75), largest)] * 2], 1e-5)
        got = sampler_weights(*args, level=level, bound=2.5)
        np.testing.assert_allclose(got, [[min(max(ratio, lowest), 2.5)] * 2], 1e-5)
