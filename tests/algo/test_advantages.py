"""`advantages.py` against hand arithmetic, NumPy loops, RLax, and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.algo import advantages
from rlhf_jax.algo.masking import include_end_state

METHODS = ["scan", "associative"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def batch(rng, mask):
    rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
    return rewards, values, mask


@pytest.fixture
def gappy(rng):
    """Rows with gaps at the start, inside and at the end, and an empty one."""
    mask = np.array(
        [[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    ).astype(bool)
    rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
    return rewards, values, mask


def row(*x):
    return jnp.array([x])


@pytest.mark.parametrize("method", METHODS)
def test_two_tokens_by_hand(maybe_jit, method):
    # F4: γ = λ = 0.5.
    # t=1: δ = 2 + 0.5·0 - 1   = 1       A = 1
    # t=0: δ = 1 + 0.5·1 - 3   = -1.5    A = -1.5 + 0.25·1 = -1.25
    fn = functools.partial(advantages.gae, gamma=0.5, lam=0.5, method=method)
    adv, ret = maybe_jit(fn)(row(1.0, 2.0), row(3.0, 1.0), row(True, True))
    np.testing.assert_allclose(adv, [[-1.25, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(ret, [[1.75, 2.0]], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("lam", "rewards", "values", "mask", "adv", "ret"),
    [
        # F1, score on the last token.
        (
            0.95,
            [0.0, 0.0, 1.0, 0.0, 0.0],
            [0.1, 0.2, 0.3, 0.7, 9.0],
            [1, 1, 1, 0, 0],
            [0.82675, 0.765, 0.7, 0, 0],
            [0.92675, 0.965, 1, 0, 0],
        ),
        (
            1.0,
            [0.0, 0.0, 1.0, 0.0, 0.0],
            [0.1, 0.2, 0.3, 0.7, 9.0],
            [1, 1, 1, 0, 0],
            [0.9, 0.8, 0.7, 0, 0],
            [1, 1, 1, 0, 0],
        ),
        # F1, score after the last token, the value there kept.
        (
            0.95,
            [0.0, 0.0, 0.0, 1.0, 0.0],
            [0.1, 0.2, 0.3, 0.7, 9.0],
            [1, 1, 1, 1, 0],
            [0.8132125, 0.75075, 0.685, 0.3, 0],
            [0.9132125, 0.95075, 0.985, 1, 0],
        ),
        (
            1.0,
            [0.0, 0.0, 0.0, 1.0, 0.0],
            [0.1, 0.2, 0.3, 0.7, 9.0],
            [1, 1, 1, 1, 0],
            [0.9, 0.8, 0.7, 0.3, 0],
            [1, 1, 1, 1, 0],
        ),
        # F1, score after the last token, value 0 there.
        (
            0.95,
            [0.0, 0.0, 0.0, 1.0, 0.0],
            [0.1, 0.2, 0.3, 0.0, 9.0],
            [1, 1, 1, 1, 0],
            [0.781625, 0.7175, 0.65, 1, 0],
            [0.881625, 0.9175, 0.95, 1, 0],
        ),
        # F2: reading the padding gives [5.7, 6, -100].
        (
            0.95,
            [0.0, 1.0, 0.0],
            [0.0, 0.0, 100.0],
            [1, 1, 0],
            [0.95, 1, 0],
            [0.95, 1, 0],
        ),
    ],
)
def test_fixtures(method, lam, rewards, values, mask, adv, ret):
    mask = jnp.array([mask], bool)
    got = advantages.gae(row(*rewards), row(*values), mask, lam=lam, method=method)
    np.testing.assert_allclose(got, ([adv], [ret]), **TOLERANCE)


def test_end_state_mask_is_that_of_the_fixture():
    got = include_end_state(jnp.array([[True, True, True, False, False]]))
    np.testing.assert_array_equal(got, [[True, True, True, True, False]])


@pytest.mark.parametrize("method", METHODS)
def test_gap_fixture(maybe_jit, method):
    # F3: the advantages of the row without its third token.
    fn = functools.partial(advantages.gae, gamma=0.99, lam=0.95, method=method)
    adv, _ = maybe_jit(fn)(
        row(0.0, 0.0, 0.0, 0.0, 1.0),
        row(0.1, 0.2, 999.0, 0.4, 0.5),
        row(True, True, False, True, True),
    )
    want = [[0.7823243763125, 0.727617625, 0, 0.56525, 0.5]]
    np.testing.assert_allclose(adv, want, **TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_matches_loop(maybe_jit, batch, gappy, method, gamma, lam):
    fn = maybe_jit(
        functools.partial(advantages.gae, gamma=gamma, lam=lam, method=method)
    )
    for rewards, values, mask in (batch, gappy):
        adv, ret = fn(jnp.array(rewards), jnp.array(values), jnp.array(mask))
        want = np.stack(
            [
                oracles.gae_row(*x, gamma, lam)
                for x in zip(rewards, values, mask, strict=True)
            ]
        )
        np.testing.assert_allclose(adv, want, **TOLERANCE)
        np.testing.assert_allclose(ret, np.where(mask, want + values, 0), **TOLERANCE)


def test_matches_the_series(rng):
    rewards, values = rng.normal(size=(2, 9))
    adv, _ = advantages.gae(
        jnp.array([rewards], jnp.float32),
        jnp.array([values], jnp.float32),
        jnp.ones((1, 9), bool),
        gamma=0.9,
        lam=0.8,
    )
    want = oracles.gae_series(rewards, values, 0.9, 0.8)
    np.testing.assert_allclose(adv[0], want, **TOLERANCE)


def test_matches_rlax(batch):
    rlax = pytest.importorskip("rlax")
    rewards, values, mask = map(jnp.asarray, batch)
    full = jnp.ones_like(mask)  # RLax has no mask
    adv, _ = advantages.gae(rewards, values, full, gamma=0.9, lam=0.8)
    want = jax.vmap(rlax.truncated_generalized_advantage_estimation, (0, 0, None, 0))(
        rewards, jnp.full_like(rewards, 0.9), 0.8, jnp.pad(values, ((0, 0), (0, 1)))
    )
    np.testing.assert_allclose(adv, want, **TOLERANCE)


@pytest.mark.parametrize("gamma_lam", [0.9405, 0.95, 0.05])
def test_long_rows_do_not_underflow(rng, gamma_lam):
    # F11: 0.95^2048 is 0 in float32; a form that divides by it gives NaN.
    rewards, values = rng.normal(size=(2, 2, 4096)).astype(np.float32)
    full = np.ones((2, 4096), bool)
    want = [
        oracles.gae_row(*x, 1.0, gamma_lam)
        for x in zip(rewards, values, full, strict=True)
    ]
    for method in METHODS:
        fn = jax.jit(functools.partial(advantages.gae, lam=gamma_lam, method=method))
        adv, _ = fn(jnp.array(rewards), jnp.array(values), jnp.array(full))
        # Sums of up to 20 numbers of size one, in another order.
        np.testing.assert_allclose(adv, want, rtol=1e-4, atol=1e-5)


def test_limits_of_lambda(batch):
    rewards, values, mask = map(jnp.asarray, batch)
    adv, ret = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.0)
    delta = advantages.td_errors(rewards, values, mask, gamma=0.9)
    np.testing.assert_allclose(adv, delta, **TOLERANCE)
    adv, ret = advantages.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    real = np.where(mask, rewards, 0.0)
    to_go = np.where(mask, np.cumsum(real[:, ::-1], axis=1)[:, ::-1], 0.0)
    np.testing.assert_allclose(ret, to_go, **TOLERANCE)
    np.testing.assert_allclose(adv, to_go - np.where(mask, values, 0), **TOLERANCE)


@given(shift=st.floats(-10, 10))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_first_advantage_telescopes(shift):
    # γ = λ = 1: A_0 = Σ r − V_0, whatever V is at the states in between.
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(2, 2, 5)).astype(np.float32)
    moved = values.copy()
    moved[:, 1:] += np.float32(shift)
    adv, _ = advantages.gae(
        jnp.array(rewards), jnp.array(moved), jnp.ones((2, 5), bool), lam=1.0
    )
    want = rewards.sum(axis=1) - values[:, 0]
    np.testing.assert_allclose(adv[:, 0], want, rtol=1e-4, atol=1e-5)


def test_td_errors_by_hand(maybe_jit):
    # γ = 0.5; a gap at t = 1. t=3 is the last: δ = 4 − 0.5 = 3.5
    # t=2: 0.25 + 0.5·0.5 − 2 = −1.5      t=0: 1.5 + 0.5·2 − 3 = −0.5
    got = maybe_jit(functools.partial(advantages.td_errors, gamma=0.5))(
        row(1.5, 7.0, 0.25, 4.0, 1.0),
        row(3.0, 9.0, 2.0, 0.5, 1.0),
        row(True, False, True, True, False),
    )
    np.testing.assert_allclose(got, [[-0.5, 0, -1.5, 3.5, 0]], rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_n_step_returns_match_loop(maybe_jit, batch, gappy, n):
    fn = maybe_jit(functools.partial(advantages.n_step_returns, n=n, gamma=0.9))
    for rewards, values, mask in (batch, gappy):
        got = fn(jnp.array(rewards), jnp.array(values), jnp.array(mask))
        want = np.zeros(mask.shape)
        for b, m in enumerate(mask):  # a gap is cut out
            want[b, m] = oracles.n_step_row(rewards[b, m], values[b, m], n, 0.9)
        np.testing.assert_allclose(got, want, **TOLERANCE)


def test_n_step_returns_bridge_td_and_monte_carlo(batch):
    rewards, values, mask = map(jnp.asarray, batch)
    one = advantages.n_step_returns(rewards, values, mask, n=1, gamma=0.9)
    delta = advantages.td_errors(rewards, values, mask, gamma=0.9)
    np.testing.assert_allclose(one - jnp.where(mask, values, 0), delta, **TOLERANCE)
    _, monte_carlo = advantages.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    all_steps = advantages.n_step_returns(rewards, values, mask, n=7, gamma=0.9)
    np.testing.assert_allclose(all_steps, monte_carlo, **TOLERANCE)


FUNCTIONS = {
    "scan": advantages.gae,
    "associative": functools.partial(advantages.gae, method="associative"),
    "td_errors": advantages.td_errors,
    "n_step_returns": functools.partial(advantages.n_step_returns, n=2),
}


@pytest.fixture(params=FUNCTIONS)
def estimate(request):
    return FUNCTIONS[request.param]


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_padding_is_never_read(maybe_jit, estimate, batch, gappy, garbage):
    for rewards, values, mask in (batch, gappy):
        dirty = [np.where(mask, x, np.float32(garbage)) for x in (rewards, values)]
        clean = maybe_jit(estimate)(*map(jnp.asarray, (rewards, values, mask)))
        other = maybe_jit(estimate)(*map(jnp.asarray, (*dirty, mask)))
        jax.tree.map(np.testing.assert_array_equal, other, clean)
        for x in jax.tree.leaves(other):
            np.testing.assert_array_equal(np.asarray(x)[~mask], 0)


def test_pad_columns_change_nothing(estimate, batch):
    wider = [np.pad(x, ((0, 0), (0, 3))) for x in batch]
    narrow = estimate(*map(jnp.asarray, batch))
    wide = estimate(*map(jnp.asarray, wider))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[:, :7], b, **TOLERANCE), wide, narrow
    )


def test_batch_order_is_irrelevant(estimate, batch):
    order = np.array([2, 0, 1])
    straight = estimate(*map(jnp.asarray, batch))
    permuted = estimate(*(jnp.asarray(x[order]) for x in batch))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[order]), permuted, straight
    )


def test_targets_carry_no_gradient(estimate, batch):
    rewards, values, mask = map(jnp.asarray, batch)

    def total(rewards, values):
        return sum(x.sum() for x in jax.tree.leaves(estimate(rewards, values, mask)))

    for grad in jax.grad(total, argnums=(0, 1))(rewards, values):
        np.testing.assert_array_equal(grad, np.zeros(mask.shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_in_float32_out(estimate, batch, dtype):
    rewards, values, mask = map(jnp.asarray, batch)
    rewards, values = rewards.astype(dtype), values.astype(dtype)
    got = estimate(rewards, values, mask)
    want = estimate(rewards.astype(jnp.float32), values.astype(jnp.float32), mask)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))


def test_rejects_integer_rewards(estimate, batch):
    rewards, values, mask = map(jnp.asarray, batch)
    with pytest.raises(AssertionError, match="type"):
        estimate(rewards.astype(jnp.int32), values, mask)
    with pytest.raises(AssertionError, match="type"):
        estimate(rewards, values, mask.astype(jnp.float32))


def test_names_wrong_options(batch):
    arrays = tuple(map(jnp.asarray, batch))
    with pytest.raises(ValueError, match="method='loop'"):
        advantages.gae(*arrays, method="loop")
    with pytest.raises(ValueError, match="n=0"):
        advantages.n_step_returns(*arrays, n=0)


@pytest.mark.parametrize("method", METHODS)
def test_numpy_numbers_with_64_bit_types_on(maybe_jit, method):
    # As in `test_two_tokens_by_hand`.
    options = {"gamma": np.float64(0.5), "lam": np.float64(0.5)}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        fn = functools.partial(advantages.gae, method=method, **options)
        x = jnp.array([[1.0, 2.0]], jnp.float32), jnp.array([[3.0, 1.0]], jnp.float32)
        adv, ret = maybe_jit(fn)(*x, row(True, True))
        assert adv.dtype == ret.dtype == jnp.float32
    np.testing.assert_allclose(adv, [[-1.25, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(ret, [[1.75, 2.0]], rtol=1e-6)


def test_n_steps_with_64_bit_types_on(maybe_jit):
    # n = 1, γ = 0.5: r_0 + 0.5 · V_1 = 1.5 and r_1 = 2.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        fn = functools.partial(
            advantages.n_step_returns, n=np.int64(1), gamma=np.float64(0.5)
        )
        x = jnp.array([[1.0, 2.0]], jnp.float32), jnp.array([[3.0, 1.0]], jnp.float32)
        got = maybe_jit(fn)(*x, row(True, True))
        assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [[1.5, 2.0]])
