"""`policy_losses.py` by hand; with `covariance_losses.py` by loops and invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_loss_oracles as oracles
import pytest

from rlhf_jax.algo.covariance_losses import clip_cov_loss, kl_cov_loss
from rlhf_jax.algo.masking import aggregate
from rlhf_jax.algo.policy_losses import (
    cispo_loss,
    clipped_policy_loss,
    gmpo_loss,
    gspo_loss,
    reinforce_loss,
    sapo_loss,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
KEY = jax.random.key(0)

# Options under which each loss clips, gates or selects some of the tokens below.
LOSSES = {
    "reinforce": reinforce_loss,
    "ppo": functools.partial(clipped_policy_loss, clip_eps=0.2, clip_eps_high=0.3),
    "gspo": functools.partial(gspo_loss, clip_eps=0.1, clip_eps_high=0.15),
    "geometric_mean": functools.partial(gmpo_loss, clip_eps=0.3, clip_eps_high=0.4),
    "cispo": functools.partial(cispo_loss, lower_bound=0.8, bound=1.5),
    "sapo": functools.partial(sapo_loss, tau_positive=1.5, tau_negative=2.5),
    "clip_cov": functools.partial(
        clip_cov_loss, key=KEY, fraction=0.3, cov_range=(0.01, 5.0)
    ),
    "kl_cov": functools.partial(kl_cov_loss, fraction=0.3, kl_coef=0.7),
}


@pytest.fixture
def arrays(rng, mask):
    """New and old log-probabilities and advantages, ratios from 0.3 to 2."""
    old, moved, advantages = rng.normal(0, 0.5, (3, *mask.shape)).astype(np.float32)
    return jnp.array(old + moved - 1), jnp.array(old - 1), jnp.array(advantages)


@pytest.fixture(params=LOSSES)
def loss_fn(request):
    return LOSSES[request.param]


# ---- against loops ----

LOOPS = {
    "reinforce": functools.partial(oracles.by_rows, oracles.reinforce),
    "ppo": functools.partial(oracles.by_rows, oracles.ppo, low=0.2, high=0.3),
    "gspo": functools.partial(oracles.by_rows, oracles.gspo, low=0.1, high=0.15),
    "geometric_mean": functools.partial(
        oracles.by_rows, oracles.geometric_mean, low=0.3, high=0.4
    ),
    "cispo": functools.partial(oracles.by_rows, oracles.cispo, low=0.8, high=1.5),
    "sapo": functools.partial(
        oracles.by_rows, oracles.sapo, positive=1.5, negative=2.5
    ),
    # 0.3 of 12 real tokens is 3.6
    "kl_cov": functools.partial(oracles.kl_cov, count=3, coef=0.7),
}
SEQUENCE_FORMS = {
    "gspo": functools.partial(oracles.gspo_sequence, low=0.1, high=0.15),
    "geometric_mean": functools.partial(
        oracles.geometric_mean_sequence, low=0.3, high=0.4
    ),
}


def differences(fn, x):
    """Central differences of a scalar function, float64."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-6
        out[i] = (fn(x + step) - fn(x - step)) / 2e-6
    return out


@pytest.mark.parametrize("name", LOOPS)
def test_values_match_a_loop(maybe_jit, arrays, mask, name):
    got = maybe_jit(LOSSES[name])(*arrays, jnp.array(mask))
    logprobs, old, advantages = arrays
    want = LOOPS[name](logprobs, logprobs, old, advantages, mask)
    np.testing.assert_allclose(got, want, **TOLERANCE)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("name", LOOPS)
def test_gradients_match_differences_of_the_loop(maybe_jit, rng, arrays, mask, name):
    logprobs, old, advantages = arrays
    weights = rng.normal(size=mask.shape)  # so that no term stands in for another

    def total(x):
        return jnp.sum(
            jnp.array(weights, jnp.float32)
            * LOSSES[name](x, old, advantages, jnp.array(mask))
        )

    def total_of_loop(x):
        return np.sum(weights * LOOPS[name](x, logprobs, old, advantages, mask))

    want = differences(total_of_loop, logprobs)
    np.testing.assert_allclose(maybe_jit(jax.grad(total))(logprobs), want, **TOLERANCE)


# ---- by hand ----


def one_row(loss_fn, log_ratios, advantages, old=-1.0):
    """Loss and gradient of a row with these log-ratios."""
    old = jnp.full((1, len(log_ratios)), old)
    mask = jnp.ones_like(old, bool)

    def fn(x):
        terms = loss_fn(x, old, jnp.array([advantages], jnp.float32), mask)
        return jnp.sum(terms), terms[0]

    logprobs = old + jnp.array([log_ratios], jnp.float32)
    grad, terms = jax.grad(fn, has_aux=True)(logprobs)
    return terms, grad[0]


def check(got, terms, grads):
    np.testing.assert_allclose(got[0], terms, **TOLERANCE)
    np.testing.assert_allclose(got[1], grads, **TOLERANCE)


def test_reinforce_by_hand():
    # −2 · (−1 + 0.3) = 1.4, and +0.5 · (−1 − 0.2) = −0.6
    check(one_row(reinforce_loss, [0.3, -0.2], [2.0, -0.5]), [1.4, -0.6], [-2.0, 0.5])


def test_gspo_by_hand():
    # log s = (0.5 − 0.1) / 2 = 0.2, s = 1.2214: above 1.1, so the token that wants more
    # is clipped, −1.1 · 2, and the one that wants less learns, 1.2214 · 0.5.
    loss_fn = functools.partial(gspo_loss, clip_eps=0.1, clip_eps_high=None)
    check(
        one_row(loss_fn, [0.5, -0.1], [2.0, -0.5]),
        [-2.2, 0.61070138],
        [0.0, 0.61070138],
    )


def test_geometric_mean_by_hand():
    # l = (min(0.9, 0.4), min(−0.9, 0.4)) = (0.4, −0.9), their mean −0.25,
    # s = e^−0.25 = 0.77880078. The first is clipped: no gradient.
    check(
        one_row(gmpo_loss, [0.9, -0.9], [2.0, 2.0]),
        [-1.55760157, -1.55760157],
        [0.0, -1.55760157],
    )
    # A < 0: l = (max(0.9, −0.4), max(−0.9, −0.4)) = (0.9, −0.4), mean 0.25.
    check(
        one_row(gmpo_loss, [0.9, -0.9], [-2.0, -2.0]),
        [2.56805083, 2.56805083],
        [2.56805083, 0.0],
    )


def test_cispo_by_hand():
    # Weights: 6 → 5, 0.1 stays, for the low side is open; log π = −1 + log ρ.
    logs = [np.log(6.0), np.log(0.1)]
    check(
        one_row(cispo_loss, logs, [2.0, 2.0]),
        [-5 * 2 * (np.log(6.0) - 1), -0.1 * 2 * (np.log(0.1) - 1)],
        [-10.0, -0.2],
    )
    # verl's form, 1 ± 0.2: 6 → 1.2, 0.1 → 0.8. Clipped, and yet a gradient.
    verl = functools.partial(cispo_loss, bound=1.2, lower_bound=0.8)
    np.testing.assert_allclose(
        one_row(verl, logs, [2.0, 2.0])[1], [-2.4, -1.6], rtol=1e-5
    )


def test_sapo_by_hand():
    # ρ = 2, A = 1, τ = 1: σ(1) = 0.73105858; −4σ; −4·σ·(1 − σ)·ρ = −8 · 0.19661193.
    # ρ = 1, A = −0.5, τ = 2: +4/2 · ½ · 0.5; gradient 4 · ¼ · 1 · 0.5.
    loss_fn = functools.partial(sapo_loss, tau_negative=2.0)
    check(
        one_row(loss_fn, [np.log(2.0), 0.0], [1.0, -0.5]),
        [-2.92423431, 0.5],
        [-1.57289546, 0.5],
    )


# ---- what each reduces to ----


@pytest.mark.parametrize("name", SEQUENCE_FORMS)
def test_token_form_has_the_gradient_of_the_sequence_form(rng, arrays, mask, name):
    # The papers' objective has one ratio per sequence and no stop-gradient in it.
    logprobs, old, _ = arrays
    a = rng.normal(size=3)
    a = np.where(np.abs(a) < 0.1, 0.1, a)

    def sequence_form(x):
        rows = [
            (x[b, m], np.asarray(old, np.float64)[b, m]) for b, m in enumerate(mask)
        ]
        return np.mean([SEQUENCE_FORMS[name](*r, a[b]) for b, r in enumerate(rows)])

    def token_form(x):
        advantages = jnp.tile(jnp.array(a, jnp.float32)[:, None], (1, 7))
        terms = LOSSES[name](x, old, advantages, jnp.array(mask))
        return aggregate(terms, jnp.array(mask), mode="seq-mean-token-mean")

    loss, grad = jax.value_and_grad(token_form)(logprobs)
    x = np.asarray(logprobs, np.float64)
    np.testing.assert_allclose(loss, sequence_form(x), rtol=1e-5)
    np.testing.assert_allclose(grad, differences(sequence_form, x), **TOLERANCE)


def test_ratio_one_is_plain_policy_gradient(loss_fn, arrays, mask):
    _, old, advantages = arrays
    if loss_fn is LOSSES["clip_cov"]:
        loss_fn = functools.partial(loss_fn, cov_range=(100.0, 200.0))
    grad = jax.grad(lambda x: jnp.sum(loss_fn(x, old, advantages, jnp.array(mask))))
    want = np.where(mask, -np.asarray(advantages), 0)
    np.testing.assert_allclose(grad(old), want, **TOLERANCE)


def test_gspo_is_clipped_by_whole_sequences(rng, arrays, mask):
    logprobs, old, advantages = arrays
    sign = np.array([[1.0], [1.0], [-1.0]], np.float32)
    advantages = jnp.abs(advantages) * sign
    # Sequence ratios of e^0.3, e^0.05, e^−0.3 with token ratios all over.
    shift = np.array([0.3, 0.05, -0.3])
    moved = rng.normal(0, 0.5, mask.shape)
    for b in range(3):
        moved[b] += shift[b] - moved[b][mask[b]].mean()
    logprobs = old + jnp.array(moved, jnp.float32)
    fn = functools.partial(gspo_loss, clip_eps=0.2, clip_eps_high=0.2)
    grad = jax.grad(lambda x: jnp.sum(fn(x, old, advantages, jnp.array(mask))))
    learns = np.asarray(grad(logprobs)) != 0
    # Row 0 is above 1.2 and wants more; row 2 below 0.8 and wants less.
    np.testing.assert_array_equal(learns, mask & np.array([[False], [True], [False]]))


def test_geometric_mean_gradient_is_zero_exactly_where_clipped(arrays, mask):
    logprobs, old, advantages = arrays
    fn = LOSSES["geometric_mean"]
    grad = jax.grad(lambda x: jnp.sum(fn(x, old, advantages, jnp.array(mask))))
    moved = np.asarray(logprobs) - np.asarray(old)
    clipped = np.where(np.asarray(advantages) > 0, moved > 0.4, moved < -0.3)
    assert (clipped & mask).any() and not clipped.all()
    np.testing.assert_array_equal(np.asarray(grad(logprobs)) == 0, clipped | ~mask)


def test_cispo_stops_no_token(arrays, mask):
    logprobs, old, advantages = arrays
    grad = jax.grad(
        lambda x: jnp.sum(LOSSES["cispo"](x, old, advantages, jnp.array(mask)))
    )(logprobs)
    np.testing.assert_array_equal(np.asarray(grad) != 0, mask)


# ---- what all of them promise ----


def value_and_grad(loss_fn, logprobs, old, advantages, mask):
    def total(x):
        terms = loss_fn(x, old, advantages, mask)
        return jnp.sum(terms), terms

    grad, terms = jax.grad(total, has_aux=True)(logprobs)
    return terms, grad


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_padding_is_never_read(loss_fn, arrays, mask, garbage):
    mask = jnp.array(mask)
    clean = value_and_grad(loss_fn, *arrays, mask)
    dirty = [jnp.where(mask, x, garbage) for x in arrays]
    for got, want in zip(value_and_grad(loss_fn, *dirty, mask), clean, strict=True):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.asarray(got)[~np.asarray(mask)], 0.0)
        assert np.all(np.isfinite(got))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"clip_cov"}))
def test_pad_columns_rows_and_order_change_nothing(arrays, mask, name):
    def pad(x):  # two columns and an empty row more, and another order
        return jnp.pad(x, ((0, 1), (0, 2)))[order]

    order = jnp.array([2, 3, 0, 1])
    mask = jnp.array(mask)
    want = value_and_grad(LOSSES[name], *arrays, mask)
    got = value_and_grad(LOSSES[name], *map(pad, arrays), pad(mask))
    for other, x in zip(got, want, strict=True):
        np.testing.assert_allclose(other, pad(x), **TOLERANCE)


def test_an_empty_batch_gives_zero(loss_fn, arrays):
    empty = jnp.zeros(arrays[0].shape, bool)
    for x in value_and_grad(loss_fn, *arrays, empty):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_a_gap_inside_a_row_counts_as_padding(loss_fn, arrays):
    mask = jnp.array([[True, False, True, True, False, False, True]] * 3)
    dirty = [jnp.where(mask, x, jnp.nan) for x in arrays]
    for got, want in zip(
        value_and_grad(loss_fn, *dirty, mask),
        value_and_grad(loss_fn, *arrays, mask),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("log_ratio", [50.0, -50.0, 79.0, -79.0])
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_finite_far_away(loss_fn, log_ratio, advantage):
    old = jnp.full((2, 3), -80.5)
    advantages = jnp.full((2, 3), advantage)
    for x in value_and_grad(
        loss_fn, old + log_ratio, old, advantages, jnp.ones((2, 3), bool)
    ):
        assert np.all(np.isfinite(x))


def test_cispo_is_finite_at_any_ratio():
    zeros, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    old = jnp.array([[-1e4, 1e4]])
    terms, grad = value_and_grad(cispo_loss, zeros - 0.5, old, zeros + 2.0, mask)
    np.testing.assert_array_equal(terms, [[5.0, 0.0]])  # −w · 2 · (−0.5)
    np.testing.assert_array_equal(grad, [[-10.0, 0.0]])


def test_gradients_stop_at_the_frozen_arrays(loss_fn, arrays, mask):
    logprobs, old, advantages = arrays

    def total(old, advantages):
        return jnp.sum(loss_fn(logprobs, old, advantages, jnp.array(mask)))

    for x in jax.grad(total, argnums=(0, 1))(old, advantages):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_half_precision_in_float32_out(loss_fn, arrays, mask):
    low = [x.astype(jnp.bfloat16) for x in arrays]
    exact = [x.astype(jnp.float32) for x in low]
    got = loss_fn(*low, jnp.array(mask))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, loss_fn(*exact, jnp.array(mask)))


def test_integers_and_wrong_shapes_are_refused(loss_fn, arrays, mask):
    logprobs, old, advantages = arrays
    mask = jnp.array(mask)
    with pytest.raises(AssertionError, match="type"):
        loss_fn(logprobs, old, advantages.astype(jnp.int32), mask)
    with pytest.raises(AssertionError, match="type"):
        loss_fn(logprobs, old, advantages, mask.astype(jnp.float32))
    with pytest.raises(AssertionError, match="rank"):
        loss_fn(logprobs, old, advantages[:, 0], mask)
    with pytest.raises(AssertionError, match="shape"):
        loss_fn(logprobs, old[:, 1:], advantages, mask)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            functools.partial(cispo_loss, lower_bound=1.2, bound=0.8),
            r"lower_bound=1\.2: ",
        ),
        (functools.partial(cispo_loss, bound=0.0), r"expected below bound=0\.0"),
        (functools.partial(sapo_loss, tau_negative=0.0), r"tau_negative=0\.0"),
        (functools.partial(kl_cov_loss, fraction=0.0), r"fraction=0\.0: expected in"),
        (functools.partial(clip_cov_loss, key=KEY, fraction=1.5), r"fraction=1\.5"),
    ],
)
def test_wrong_options_are_named(arrays, mask, fn, message):
    with pytest.raises(ValueError, match=message):
        fn(*arrays, jnp.array(mask))
