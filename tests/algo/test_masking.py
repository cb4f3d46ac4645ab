"""`masking.py` by hand, against NumPy, and by invariance."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.algo import masking

MODES = get_args(masking.Aggregation)


def test_response_mask_by_hand(maybe_jit):
    tokens = jnp.array(
        [
            [5, 2, 2, 5],  # stops at the first 2; a second one is padding
            [5, 6, 7, 2],  # stops at the last column
            [5, 6, 7, 8],  # never stops
            [2, 9, 9, 9],  # length one
            [7, 3, 5, 5],  # stops at the other id
        ],
        jnp.int32,
    )
    got = maybe_jit(functools.partial(masking.response_mask, stop_ids=(2, 3)))(tokens)
    want = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(got, np.array(want, bool))


def test_response_mask_takes_one_id_or_none():
    tokens = jnp.array([[5, 2, 3, 5]], jnp.int32)
    one = masking.response_mask(tokens, stop_ids=3)
    none = masking.response_mask(tokens, stop_ids=())
    np.testing.assert_array_equal(one, [[True, True, True, False]])
    np.testing.assert_array_equal(none, [[True, True, True, True]])


def test_response_mask_refuses_floats():
    with pytest.raises(AssertionError, match="type"):
        masking.response_mask(jnp.ones((1, 2)), stop_ids=1)


def test_last_token_and_end_state_by_hand(maybe_jit):
    mask = jnp.array(
        [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=bool
    )
    np.testing.assert_array_equal(
        maybe_jit(masking.last_token_index)(mask), [1, 3, 0, 2]
    )
    want = [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]
    np.testing.assert_array_equal(
        maybe_jit(masking.include_end_state)(mask), np.array(want, bool)
    )


def test_select_index_reads_only_the_selected(maybe_jit):
    x = jnp.array([[0.5, np.nan, np.inf], [np.nan, 1.5, np.nan]])
    got = maybe_jit(masking.select_index)(x, jnp.array([0, 1]))
    np.testing.assert_array_equal(got, [0.5, 1.5])
    counts = masking.select_index(jnp.array([[3, 4]], jnp.int32), jnp.array([1]))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, [4])


def test_masked_mean_by_hand(maybe_jit):
    x = jnp.array([[1.5, 2.5, np.nan], [np.inf, np.nan, 0.25]])
    mask = jnp.array([[True, True, False], [False, False, True]])
    # (1.5 + 2.5 + 0.25) / 3
    np.testing.assert_allclose(maybe_jit(masking.masked_mean)(x, mask), 4.25 / 3)
    rows = maybe_jit(functools.partial(masking.masked_mean, axis=1))(x, mask)
    np.testing.assert_allclose(rows, [2.0, 0.25])


def test_masked_mean_of_nothing_is_zero():
    assert masking.masked_mean(jnp.full((2, 2), np.nan), jnp.zeros((2, 2), bool)) == 0


def test_masked_mean_returns_float32():
    x = jnp.array([0.5, 1.5], jnp.bfloat16)
    assert masking.masked_mean(x, jnp.array([True, True])).dtype == jnp.float32
    with pytest.raises(AssertionError, match="type"):
        masking.masked_mean(jnp.array([1, 2]), jnp.array([True, True]))


# F7: x = 1.2 … 2.0, mean 1.6; variance 0.0666… with ddof 0 and 0.075 with ddof 1.
WHITENED = {
    (0, True): [
        [-1.54919322229348, -1.1618949167201098, -0.7745966111467405],
        [-0.38729830557337025, 0, 0.38729830557336936],
        [0.7745966111467396, 1.161894916720109, 1.5491932222934792],
    ],
    (1, True): [
        [-1.4605933893075542, -1.0954450419806654, -0.7302966946537776],
        [-0.3651483473268888, 0, 0.36514834732688795],
        [0.7302966946537767, 1.0954450419806647, 1.4605933893075533],
    ],
    (0, False): [
        [0.05080677770651998, 0.4381050832798903, 0.8254033888532596],
        [1.2127016944266298, 1.6, 1.9872983055733695],
        [2.37459661114674, 2.761894916720109, 3.149193222293479],
    ],
    (1, False): [
        [0.13940661069244586, 0.5045549580193347, 0.8697033053462225],
        [1.2348516526731113, 1.6, 1.965148347326888],
        [2.330296694653777, 2.6954450419806646, 3.060593389307553],
    ],
}


@pytest.mark.parametrize(("ddof", "center"), WHITENED)
def test_whitening_fixture(maybe_jit, ddof, center):
    x = jnp.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    fn = functools.partial(masking.masked_whiten, center=center, ddof=ddof)
    got = maybe_jit(fn)(x, jnp.ones((3, 3), bool))
    np.testing.assert_allclose(got, WHITENED[ddof, center], rtol=1e-5, atol=1e-6)


def test_whitening_fixture_separates_centring():
    x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
    got = masking.masked_whiten(x, jnp.ones((1, 4), bool), ddof=1)
    want = [[-0.9258200987806015, -0.4629100493903007, 0, 1.3887301481709022]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("garbage", [0.5, 1e6, np.nan, np.inf])
def test_whitening_reads_real_tokens_only(rng, mask, garbage, ddof, center):
    x = rng.normal(1.3, 2.1, mask.shape).astype(np.float32)
    dirty = jnp.where(mask, x, garbage)
    got = masking.masked_whiten(dirty, jnp.array(mask), center=center, ddof=ddof)
    want = np.zeros(mask.shape)
    want[mask] = oracles.whiten(x[mask].astype(np.float64), ddof, center=center)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@given(scale=st.floats(0.25, 20), shift=st.floats(-30, 30))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_whitening_is_affine_invariant(scale, shift):
    rng = np.random.default_rng(1)
    x = jnp.array(rng.normal(size=(3, 7)), jnp.float32)
    mask = jnp.array(np.arange(7) < np.array([1, 4, 7])[:, None])
    y = masking.masked_whiten(x, mask)
    z = masking.masked_whiten(scale * x + shift, mask)
    # A shift by 30 costs the input two decimals of precision.
    np.testing.assert_allclose(z, y, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.sum(y) / 12, 0, atol=1e-6)
    np.testing.assert_allclose(np.sum(np.square(y)) / 12, 1, rtol=1e-5)


@pytest.mark.parametrize("constant", [0.1, -17.3, 12345.678])
def test_whitening_a_constant_gives_zero(mask, constant):
    got = masking.masked_whiten(jnp.full(mask.shape, constant), jnp.array(mask))
    np.testing.assert_allclose(got, np.zeros(mask.shape), atol=1e-3)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_one_token_or_none_is_zero(ddof):
    x = jnp.array([[0.7, np.nan]])
    for mask in ([[True, False]], [[False, False]]):
        got = masking.masked_whiten(x, jnp.array(mask), ddof=ddof)
        np.testing.assert_array_equal(got, [[0.0, 0.0]])


# One row of 1 token, one of 3, one of none; token losses 1.5 | 2, 2.5, 6.5 | -.
TERMS = np.array([[1.5, np.nan, 7.0], [2.0, 2.5, 6.5], [np.inf, 9.0, 9.0]], np.float32)
TERMS_MASK = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
AGGREGATED = {
    "token-mean": 12.5 / 4,
    "seq-mean-token-mean": (1.5 + 11 / 3) / 2,
    "seq-mean-token-sum": (1.5 + 11.0) / 2,
    "seq-mean-token-sum-norm": (1.5 + 11.0) / 3 / 2,  # answers may have 3 tokens
    "token-sum": 12.5,
}


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_by_hand(maybe_jit, mode):
    fn = maybe_jit(functools.partial(masking.aggregate, mode=mode))
    got = fn(jnp.array(TERMS), jnp.array(TERMS_MASK))
    np.testing.assert_allclose(got, AGGREGATED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_of_nothing_is_zero(mode):
    nothing = jnp.zeros((2, 3), bool)
    assert masking.aggregate(jnp.full((2, 3), np.nan), nothing, mode=mode) == 0


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_never_reads_padding(mode):
    fn = functools.partial(masking.aggregate, mode=mode)
    grad = jax.grad(fn)(jnp.array(TERMS), jnp.array(TERMS_MASK))
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(np.asarray(grad)[~TERMS_MASK], 0)
    wider = np.pad(TERMS, ((0, 0), (0, 2)), constant_values=np.nan)
    wider_mask = np.pad(TERMS_MASK, ((0, 0), (0, 2)))
    got = fn(jnp.array(wider), jnp.array(wider_mask), length=3)
    np.testing.assert_allclose(got, AGGREGATED[mode], rtol=1e-6)


def test_the_norm_is_the_limit_of_answers_and_not_their_length():
    norm = functools.partial(masking.aggregate, mode="seq-mean-token-sum-norm")
    args = (jnp.array(TERMS), jnp.array(TERMS_MASK))
    np.testing.assert_allclose(norm(*args, length=10), 12.5 / 10 / 2, rtol=1e-6)
    # Two columns of padding: T = 5 is taken for the limit.
    wider = [jnp.pad(x, ((0, 0), (0, 2))) for x in args]
    np.testing.assert_allclose(norm(*wider), 12.5 / 5 / 2, rtol=1e-6)
    # A constant: the gradient points where that of the sums does, in every answer.
    grad = jax.grad(norm)(*args)
    sums = functools.partial(masking.aggregate, mode="seq-mean-token-sum")
    np.testing.assert_allclose(3 * grad, jax.grad(sums)(*args), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_microbatches_add_up_to_the_minibatch(mode):
    parts = [
        masking.aggregate(
            jnp.array(TERMS[rows]),
            jnp.array(TERMS_MASK[rows]),
            mode=mode,
            num_tokens=4,
            num_sequences=jnp.int32(2),
        )
        for rows in ([0], [1], [2])
    ]
    np.testing.assert_allclose(sum(parts), AGGREGATED[mode], rtol=1e-6)


def test_global_token_mean_is_not_the_mean_of_means():
    # F8: token losses 1, 2 and 3 … 7: global mean 28 / 7 = 4; mean of means 3.25.
    parts = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0, 5.0, 6.0, 7.0]])]
    means = [masking.aggregate(x, jnp.ones(x.shape, bool), num_tokens=7) for x in parts]
    np.testing.assert_allclose(sum(means), 4.0, rtol=1e-6)


def test_token_mean_is_the_mean_of_row_means_for_equal_lengths_only(rng):
    x = jnp.array(rng.normal(size=(3, 5)), jnp.float32)
    for lengths, equal in (([4, 4, 4], True), ([1, 4, 5], False)):
        mask = jnp.array(np.arange(5) < np.array(lengths)[:, None])
        by_token = masking.aggregate(x, mask)
        by_row = masking.aggregate(x, mask, mode="seq-mean-token-mean")
        assert np.isclose(by_token, by_row, rtol=1e-5) == equal


def test_aggregate_names_an_unknown_mode():
    with pytest.raises(ValueError, match=r"mode='mean'.*token-sum"):
        masking.aggregate(jnp.ones((1, 1)), jnp.ones((1, 1), bool), mode="mean")
