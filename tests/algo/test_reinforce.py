"""`reinforce.py` by hand, against NumPy loops, and by identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax.algo.group_advantages import (
    gpg_advantages,
    group_advantages,
    opo_advantages,
)
from rlhf_jax.algo.reinforce import (
    broadcast_over_tokens,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    rewards_to_go,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
SCORES = jnp.array([0.5, 1.5, 2.5, 0.25, 0.75, -0.5, -0.5])
IDS = jnp.array([7, 7, 7, -1, -1, 3, 3])
LENGTHS = jnp.array([2, 5, 3, 1, 9, 4, 4])

# From scores and groups alone.
ESTIMATORS = {
    "opo": lambda scores, groups: opo_advantages(scores, LENGTHS, groups),
    "gpg": gpg_advantages,
    "gpg_std": functools.partial(gpg_advantages, scale="std"),
    "pass_at_k": pass_at_k_advantages,
    "pass_at_k_std": functools.partial(pass_at_k_advantages, scale="std"),
}


def test_broadcast_by_hand(maybe_jit):
    mask = jnp.array([[True, True, False], [False, True, True], [False] * 3])
    got = maybe_jit(broadcast_over_tokens)(jnp.array([0.5, -1.5, jnp.nan]), mask)
    np.testing.assert_array_equal(got, [[0.5, 0.5, 0], [0, -1.5, -1.5], [0, 0, 0]])
    assert got.dtype == jnp.float32


# ---- from token rewards ----


def test_rewards_to_go_by_hand(maybe_jit):
    # γ = 0.5: 1.5; 0.25 + 0.75 = 1; 2 + 0.5 = 2.5. A gap is passed over.
    mask = jnp.array([[True, True, False, True, False]])
    rewards = jnp.array([[2.0, 0.25, jnp.nan, 1.5, jnp.inf]])
    got = maybe_jit(functools.partial(rewards_to_go, gamma=0.5))(rewards, mask)
    np.testing.assert_allclose(got, [[2.5, 1.0, 0.0, 1.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_rewards_to_go_match_a_loop(maybe_jit, rng, mask, gamma):
    rewards = rng.normal(size=mask.shape)
    got = maybe_jit(functools.partial(rewards_to_go, gamma=gamma))(
        jnp.array(rewards, jnp.float32), jnp.array(mask)
    )
    want = np.zeros(mask.shape)
    for b, length in enumerate(mask.sum(axis=1)):
        for t in range(length):
            want[b, t] = sum(gamma ** (k - t) * rewards[b, k] for k in range(t, length))
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("ddof", [0, 1])
def test_reinforce_plus_plus_matches_a_loop(maybe_jit, rng, mask, ddof):
    rewards = rng.normal(size=mask.shape)
    fn = functools.partial(reinforce_plus_plus_advantages, gamma=0.9, ddof=ddof)
    got = maybe_jit(fn)(jnp.array(rewards, jnp.float32), jnp.array(mask))
    returns = np.array(
        [
            oracles.gae_row(r, np.zeros(7), m, 0.9, 1.0)
            for r, m in zip(rewards, mask, strict=True)
        ]
    )
    want = np.zeros(mask.shape)
    want[mask] = oracles.whiten(returns[mask], ddof)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("ddof", [0, 1])
def test_reinforce_plus_plus_baseline_by_hand(maybe_jit, ddof):
    # Scores 0.5 and 1.5 of one group, 2 and 4 of another, over 1, 3, 2 and 2 tokens:
    # s − μ = −0.5, 0.5, −1, 1 at 8 tokens, mean (−0.5 + 1.5 − 2 + 2) / 8 = 0.125,
    # squares 0.625² + 3 · 0.375² + 2 · 1.125² + 2 · 0.875² = 4.875.
    lengths = jnp.array([1, 3, 2, 2])
    mask = jnp.arange(3)[None, :] < lengths[:, None]
    fn = functools.partial(reinforce_plus_plus_baseline_advantages, ddof=ddof)
    got = maybe_jit(functools.partial(fn, groups=2))(
        jnp.array([0.5, 1.5, 2.0, 4.0]), mask=mask
    )
    sigma = np.sqrt(4.875 / (8 - ddof))
    want = np.array([-0.625, 0.375, -1.125, 0.875])[:, None] / sigma
    np.testing.assert_allclose(got, np.where(mask, want, 0), **TOLERANCE)


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_padding_is_never_read(rng, mask, garbage):
    rewards = jnp.array(rng.normal(size=mask.shape), jnp.float32)
    mask = jnp.array(mask)
    dirty = jnp.where(mask, rewards, garbage)
    for fn in (rewards_to_go, reinforce_plus_plus_advantages):
        np.testing.assert_array_equal(fn(dirty, mask), fn(rewards, mask))
        assert np.all(np.asarray(fn(dirty, mask))[~np.asarray(mask)] == 0)


def test_whitened_over_what_is_real(rng, mask):
    rewards = jnp.array(rng.normal(size=mask.shape), jnp.float32)
    scores = jnp.array(rng.normal(size=3), jnp.float32)
    for got in (
        reinforce_plus_plus_advantages(rewards, jnp.array(mask)),
        reinforce_plus_plus_baseline_advantages(scores, 3, jnp.array(mask)),
    ):
        real = np.asarray(got)[mask]
        assert real.mean() == pytest.approx(0, abs=1e-6)
        assert real.var() == pytest.approx(1, rel=1e-5)


# ---- from scores ----


def test_remax_by_hand(maybe_jit):
    got = maybe_jit(remax_advantages)(jnp.array([0.5, -1.0]), jnp.array([0.75, -2.5]))
    np.testing.assert_array_equal(got, [-0.25, 1.5])


def test_opo_by_hand(maybe_jit):
    # (2 · 0.5 + 5 · 1.5 + 3 · 2.5) / 10 = 1.6;   (0.25 + 9 · 0.75) / 10 = 0.7;   −0.5
    got = maybe_jit(opo_advantages)(SCORES, LENGTHS, IDS)
    want = [-1.1, -0.1, 0.9, -0.45, 0.05, 0, 0]
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_opo_weighs_by_length(rng):
    scores = jnp.array(rng.normal(size=12), jnp.float32)
    lengths = jnp.array(rng.integers(1, 50, 12))
    got = opo_advantages(scores, lengths, 4)
    sums = (np.asarray(got) * np.asarray(lengths)).reshape(3, 4).sum(axis=1)
    np.testing.assert_allclose(sums, np.zeros(3), atol=1e-4)
    # Equal lengths make it the mean.
    same = opo_advantages(scores, jnp.full(12, 17), 4)
    np.testing.assert_allclose(
        same, group_advantages(scores, 4, baseline="mean"), **TOLERANCE
    )


def test_opo_of_answers_without_tokens_is_finite():
    got = opo_advantages(jnp.array([0.5, 1.5]), jnp.array([0, 0]), 2)
    assert np.all(np.isfinite(got))


def test_gpg_by_hand(maybe_jit):
    # Group 3 is of equal scores: α = 7 / 5. Group means 1.5 and 0.5.
    got = maybe_jit(gpg_advantages)(SCORES, IDS)
    want = 1.4 * np.array([-1.0, 0.0, 1.0, -0.25, 0.25, 0, 0])
    np.testing.assert_allclose(got, want, **TOLERANCE)
    # σ = 1 and 0.25 · √2.
    fn = functools.partial(gpg_advantages, scale="std", eps=0.01)
    sigma = np.array([1.0] * 3 + [0.25 * np.sqrt(2)] * 2 + [0.0] * 2) + 0.01
    np.testing.assert_allclose(maybe_jit(fn)(SCORES, IDS), want / sigma, **TOLERANCE)


def test_gpg_counts_signals_not_nonzero_scores():
    # Both groups are scored 0 and 1 alone; one is solved by all. verl: 4 / 3.
    got = gpg_advantages(jnp.array([1.0, 1.0, 0.0, 1.0]), 2)
    np.testing.assert_allclose(got, [0, 0, -1.0, 1.0], rtol=1e-6)  # α = 4 / 2
    np.testing.assert_array_equal(gpg_advantages(jnp.array([1.0] * 4), 2), [0.0] * 4)


@pytest.mark.parametrize("constant", [0.1, -17.3, 12345.678])
def test_gpg_sees_equal_scores_in_spite_of_rounding(constant):
    scores = jnp.concatenate([jnp.full(7, constant), jnp.arange(7.0) + 0.5])
    got = gpg_advantages(scores, 7)
    np.testing.assert_allclose(got[7:], 2.0 * np.arange(-3, 4), rtol=1e-5)
    np.testing.assert_array_equal(got[:7], np.zeros(7))


def test_passk_by_hand(maybe_jit):
    # 2.5 − 1.5 and 0.75 − 0.25; two share the first place of group 3.
    want = [0, 0, 1.0, 0, 0.5, 0, 0]
    np.testing.assert_allclose(maybe_jit(pass_at_k_advantages)(SCORES, IDS), want)
    fn = functools.partial(pass_at_k_advantages, scale="std", eps=0.01)
    got = maybe_jit(fn)(SCORES, IDS)
    sigma = 0.25 * np.sqrt(2)
    np.testing.assert_allclose(got[2], 1.0 / 1.01, rtol=1e-6)
    np.testing.assert_allclose(got[4], 0.5 / (sigma + 0.01), rtol=1e-6)


def test_passk_with_an_early_best_and_a_tie_behind_it():
    got = pass_at_k_advantages(jnp.array([3.0, 1.0, 1.0, -2.5, -2.5, -2.75]), 3)
    np.testing.assert_array_equal(got, [2.0, 0, 0, 0, 0, 0])


# ---- what they share ----


@pytest.mark.parametrize("name", ESTIMATORS)
def test_order_and_names_of_groups_do_not_matter(maybe_jit, rng, name):
    order = rng.permutation(7)
    scores, ids, lengths = SCORES[order], IDS[order], LENGTHS[order]
    fn = ESTIMATORS[name]
    want = fn(SCORES, IDS)[order]
    if name == "opo":
        fn = functools.partial(opo_advantages, lengths=lengths)
        got = maybe_jit(fn)(scores, groups=ids * 5 - 2)
    else:
        got = maybe_jit(fn)(scores, ids * 5 - 2)
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"opo"}))
def test_size_and_ids_agree(maybe_jit, rng, name):
    scores = jnp.array(rng.normal(size=12), jnp.float32)
    fn = ESTIMATORS[name]
    by_size = maybe_jit(functools.partial(fn, groups=4))(scores)
    by_id = maybe_jit(fn)(scores, jnp.repeat(jnp.array([3, 9, 5]), 4))
    np.testing.assert_allclose(by_size, by_id, **TOLERANCE)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_alone_or_equal_gives_zero(name):
    singles = ESTIMATORS[name](SCORES, 1)
    np.testing.assert_array_equal(singles, np.zeros(7))
    equal = ESTIMATORS[name](jnp.full(7, 0.7), 7)
    np.testing.assert_allclose(equal, np.zeros(7), atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_common_shift_of_a_group_changes_nothing(name):
    shift = jnp.where(IDS == 7, 2.0, jnp.where(IDS == 3, -0.5, 0.25))
    got = ESTIMATORS[name](SCORES + shift, IDS)
    np.testing.assert_allclose(got, ESTIMATORS[name](SCORES, IDS), **TOLERANCE)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_in_float32_out_and_integers_refused(name):
    got = ESTIMATORS[name](SCORES.astype(jnp.bfloat16), IDS)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, ESTIMATORS[name](SCORES, IDS))  # exact in bf16
    with pytest.raises(AssertionError, match="type"):
        ESTIMATORS[name](jnp.arange(7), IDS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_gradient(name):
    grad = jax.grad(lambda s: jnp.sum(ESTIMATORS[name](s, IDS) * jnp.arange(7.0)))
    np.testing.assert_array_equal(grad(SCORES), np.zeros(7))


def test_no_gradient_through_tokens():
    # Of the two that give one number per token.
    mask = jnp.arange(7)[:, None] >= jnp.array([[0, 1, 9]])
    weights = jnp.arange(21.0).reshape(7, 3)
    for fn in (
        lambda s: broadcast_over_tokens(s, mask),
        lambda s: reinforce_plus_plus_baseline_advantages(s, IDS, mask),
    ):
        grad = jax.grad(lambda s, fn=fn: jnp.sum(fn(s) * weights))(SCORES)
        np.testing.assert_array_equal(grad, np.zeros(7))


def test_wrong_options_are_named():
    for fn in (gpg_advantages, pass_at_k_advantages):
        with pytest.raises(ValueError, match="scale='batch': expected"):
            fn(SCORES, IDS, scale="batch")
        with pytest.raises(ValueError, match="group size 2: expected a divisor of the"):
            fn(SCORES, 2)
