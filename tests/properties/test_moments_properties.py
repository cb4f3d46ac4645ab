"""Running moments of scores, and importance weights of a sampler that rounds."""

from functools import partial
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import CHECK, TOLERANCE, B, arrays, batches

from rlhf_jax.algo.off_policy import SamplerLevel, sampler_weights
from rlhf_jax.algo.scores import (
    init_score_moments,
    normalize_scores,
    update_score_moments,
)

N = 16
update = jax.jit(update_score_moments)
normalize = jax.jit(normalize_scores)


@given(scores=arrays((N,)), level=st.sampled_from([0.0, 100.0, -1e4]))
@CHECK
def test_moments_of_batches_are_those_of_all_at_once(scores, level):
    scores = (scores + level).astype(np.float32)
    moments = init_score_moments()
    for batch in np.split(scores, [1, 4, 8]):  # of 1, 3, 4 and 8 scores
        moments = update(moments, batch)
    exact = scores.astype(np.float64)
    assert moments.count == N
    np.testing.assert_allclose(moments.mean, exact.mean(), rtol=1e-6, atol=1e-5)
    # Float32 knows the mean of numbers near 1e4 to 1e-3, and squares near 1 to that.
    np.testing.assert_allclose(
        moments.squares / N, exact.var(), rtol=1e-5 + 1e-7 * abs(level), atol=1e-5
    )


@given(scores=arrays((N,)), first=st.sampled_from([1, 4, 8]))
@CHECK
def test_the_order_of_batches_does_not_matter(scores, first):
    start = init_score_moments()
    one = update(update(start, scores[:first]), scores[first:])
    other = update(update(start, scores[first:]), scores[:first])
    jax.tree.map(partial(np.testing.assert_allclose, **TOLERANCE), one, other)


@given(scores=arrays((N,)), others=arrays((B,)))
@CHECK
def test_normalized_by_what_was_seen(scores, others):
    moments = update(init_score_moments(), scores)
    got = normalize(others, moments)
    exact = scores.astype(np.float64)
    if exact.std() > 0:
        want = (others - exact.mean()) / exact.std()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    itself = np.asarray(normalize(scores, moments), np.float64)
    np.testing.assert_allclose(itself.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(itself.std(), float(exact.std() > 0), rtol=1e-4)


@given(scores=arrays((B,)))
@CHECK
def test_before_anything_was_seen_and_after_one_score_it_is_finite(scores):
    nothing = init_score_moments()
    one = update(nothing, scores[:1])
    assert one.squares == 0
    for moments in (nothing, one):
        assert np.isfinite(normalize(scores, moments)).all()
    assert normalize(scores, one)[0] == 0


# ---- sampler ----

weigh = {
    (mode, level): jax.jit(partial(sampler_weights, mode=mode, level=level))
    for mode in ("truncate", "mask")
    for level in get_args(SamplerLevel)
}


@pytest.mark.parametrize("level", get_args(SamplerLevel))
@given(batch=batches(), bounds=st.sampled_from([(0.0, 2.0), (0.5, 1.5), (0.9, 5.0)]))
@CHECK
def test_sampler_weights_by_their_definition(level, batch, bounds):
    names = ("old_logprobs", "sampler_logprobs", "mask")
    old, sampler, mask = (batch[name] for name in names)
    log_ratio = old.astype(np.float64) - sampler
    ratio, (low, high) = np.exp(log_ratio), bounds
    if level != "token":
        rows = [np.prod(x[m]) for x, m in zip(ratio, mask, strict=True)]
        if level == "geometric":
            rows = [x ** (1 / max(m.sum(), 1)) for x, m in zip(rows, mask, strict=True)]
        ratio = np.broadcast_to(np.array(rows)[:, None], mask.shape)
    inside = (ratio >= low) & (ratio <= high)
    for mode, want in (
        ("truncate", np.minimum(np.maximum(ratio, low), high)),
        ("mask", np.where(inside, ratio, 0)),
    ):
        got = weigh[mode, level](old, sampler, mask, bound=high, lower_bound=low)
        np.testing.assert_allclose(got, np.where(mask, want, 0), **TOLERANCE)
        assert got.dtype == np.float32


@pytest.mark.parametrize("key", weigh)
@given(batch=batches())
@CHECK
def test_a_sampler_like_the_trainer_needs_no_weights(key, batch):
    same = batch["old_logprobs"]
    got = weigh[key](same, same, batch["mask"])
    np.testing.assert_array_equal(got, batch["mask"].astype(np.float32))


@pytest.mark.parametrize("key", weigh)
def test_weights_carry_no_gradient(key):
    x = np.full((2, 3), -1.5, np.float32)

    def total(old, sampler):
        return weigh[key](old, sampler, x < 0).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(x, x - 0.25):
        np.testing.assert_array_equal(gradient, 0)


def test_unknown_modes_and_levels_are_named():
    x = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match="mode='clip': expected 'truncate' or 'mask'"):
        sampler_weights(x, x, x == 0, mode="clip")
    with pytest.raises(ValueError, match="level='row': expected 'token', 'sequence'"):
        sampler_weights(x, x, x == 0, level="row")
