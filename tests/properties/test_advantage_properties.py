"""GAE and its relatives: all forms agree, limits, telescoping, gaps, bootstrapping."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.strategies import (
    CHECK,
    TOLERANCE,
    B,
    T,
    any_masks,
    arrays,
    batches,
    ragged_masks,
)

from rlhf_jax.algo import advantages

FRACTIONS = st.integers(0, 16).map(lambda k: k / 16)  # 0 and 1 included
FORMS = ["scan", "associative"]
gae = {
    (form, gaps): jax.jit(partial(advantages.gae, method=form, gaps=gaps))
    for form in FORMS
    for gaps in ("carry", "zero")
}
td_errors = jax.jit(advantages.td_errors)
n_step_returns = jax.jit(advantages.n_step_returns, static_argnames="n")
length_adaptive_lam = jax.jit(advantages.length_adaptive_lam)


def named(batch, *names):
    return [batch[name] for name in names]


def rvm(batch):
    return named(batch, "rewards", "values", "mask")


def close(got, want, mask=None):
    """Also 0 wherever the mask is False, if one is given."""
    want = want if mask is None else np.where(mask, want, 0.0)
    np.testing.assert_allclose(got, want, **TOLERANCE)


def by_rows(fn, batch, *more):
    """`fn(r, v, *more)` of every row without its gaps, put back into place."""
    out = np.zeros((B, T))
    for b, m in enumerate(batch["mask"]):
        row = [batch[name][b][m].astype(np.float64) for name in ("rewards", "values")]
        out[b, m] = fn(*row, *(x[b] for x in more))
    return out


def bootstrapped_gae(r, v, gamma, lam, slow, end):
    """One row without gaps, bootstrapped from another critic and a value of the end.

    By the λ-return, which does not know V: R_t = r_t + γ((1 − λ)V'_{t+1} + λR_{t+1}).
    """
    ahead = np.append(slow[1:], end)[: len(r)]
    returns = np.zeros(len(r))
    following = end
    for t in reversed(range(len(r))):
        following = r[t] + gamma * ((1 - lam) * ahead[t] + lam * following)
        returns[t] = following
    return returns - v


# ---- all forms agree ----


@pytest.mark.parametrize("form", FORMS)
@given(batch=batches(), gamma=FRACTIONS, lam=FRACTIONS)
@CHECK
def test_every_form_is_the_sum_over_the_row_without_its_gaps(form, batch, gamma, lam):
    adv, ret = gae[form, "carry"](*rvm(batch), gamma=gamma, lam=lam)
    want = by_rows(lambda r, v: oracles.gae_series(r, v, gamma, lam), batch)
    close(adv, want)
    close(ret, want + batch["values"], batch["mask"])


@pytest.mark.parametrize("form", FORMS)
@given(
    batch=batches(),
    gamma=FRACTIONS,
    lam=st.lists(FRACTIONS, min_size=B, max_size=B),
)
@CHECK
def test_a_lambda_per_row_another_critic_and_a_value_of_the_end(
    form, batch, gamma, lam
):
    # As long as there is a token at all; a row without any has no end.
    lam = np.array(lam, np.float32)
    targets, ends = named(batch, "target_values", "end_values")
    adv, ret = gae[form, "carry"](
        *rvm(batch), gamma=gamma, lam=lam, target_values=targets, end_values=ends
    )
    slow = [row[m] for row, m in zip(targets, batch["mask"], strict=True)]
    want = by_rows(bootstrapped_gae, batch, [gamma] * B, lam, slow, ends)
    close(adv, want)
    close(ret, want + batch["values"], batch["mask"])


@given(seed=st.integers(0, 1000), gamma=st.floats(0.5, 1), lam=st.floats(0.0, 0.99))
@settings(CHECK, max_examples=8)
def test_long_rows(seed, gamma, lam):
    # 0.99^4096 is 1e-18, and most powers of γλ are 0 in float32.
    rewards, values = np.random.default_rng(seed).normal(size=(2, 1, 4096))
    want = oracles.gae_row(rewards[0], values[0], np.ones(4096), gamma, lam)
    batch = (jnp.float32(rewards), jnp.float32(values), jnp.ones((1, 4096), bool))
    for form in FORMS:
        adv, _ = gae[form, "carry"](*batch, gamma=gamma, lam=lam)
        # Sums of up to 1 / (1 − γλ) = 100 numbers of size one, in another order.
        np.testing.assert_allclose(adv[0], want, rtol=1e-4, atol=1e-4)


# ---- limits ----


@given(batch=batches(), gamma=FRACTIONS)
@CHECK
def test_limits_of_lambda_and_of_n(batch, gamma):
    mask, values = named(batch, "mask", "values")
    errors = by_rows(lambda r, v: r + gamma * np.append(v[1:], 0)[: len(r)] - v, batch)

    def to_go(r, v):
        return [
            sum(gamma ** (k - t) * r[k] for k in range(t, len(r)))
            for t in range(len(r))
        ]

    monte_carlo = by_rows(to_go, batch)
    adv, ret = gae["scan", "carry"](*rvm(batch), gamma=gamma, lam=0.0)
    close(adv, errors)
    close(ret, errors + values, mask)
    close(td_errors(*rvm(batch), gamma=gamma), errors)
    close(n_step_returns(*rvm(batch), gamma=gamma, n=1), errors + values, mask)
    adv, ret = gae["scan", "carry"](*rvm(batch), gamma=gamma, lam=1.0)
    close(adv, monte_carlo - values, mask)
    close(ret, monte_carlo)
    close(n_step_returns(*rvm(batch), gamma=gamma, n=T), monte_carlo)


@given(batch=batches(masks=any_masks), inner=arrays((B, T), bound=16.0))
@CHECK
def test_the_first_advantage_telescopes(batch, inner):
    # γ = λ = 1: A_0 = Σ r − V_0, whatever the critic says of the states in between.
    rewards, values, mask = rvm(batch)
    first = mask & (np.cumsum(mask, axis=1) == 1)
    moved = np.where(first, values, inner)
    adv, _ = gae["scan", "carry"](rewards, moved, mask, gamma=1.0, lam=1.0)
    total = np.sum(rewards, axis=1, where=mask)[:, None]
    close(np.asarray(adv)[first], (total - values)[first])


# ---- gaps and rows ----


@pytest.mark.parametrize("form", FORMS)
@given(batch=batches(), gamma=FRACTIONS, lam=FRACTIONS)
@CHECK
def test_zero_filled_gaps_are_states_without_value_or_reward(form, batch, gamma, lam):
    adv, ret = gae[form, "zero"](*rvm(batch), gamma=gamma, lam=lam)
    want = np.zeros((B, T))
    for b, m in enumerate(batch["mask"]):
        end = max(np.flatnonzero(m), default=-1) + 1
        r, v = (np.where(m, batch[name][b], 0)[:end] for name in ("rewards", "values"))
        want[b, :end] = oracles.gae_series(r, v, gamma, lam)
    close(adv, want, batch["mask"])
    close(ret, want + batch["values"], batch["mask"])


@pytest.mark.parametrize("form", FORMS)
def test_zero_filled_gap_fixture(form):
    adv, _ = gae[form, "zero"](
        jnp.array([[0.0, 0.0, 0.0, 0.0, 1.0]]),
        jnp.array([[0.1, 0.2, 999.0, 0.4, 0.5]]),
        jnp.array([[True, True, False, True, True]]),
        gamma=0.99,
        lam=0.95,
    )
    close(adv, [[0.7304151259219062, 0.6724243763125, 0, 0.56525, 0.5]])


@given(batch=batches(masks=ragged_masks()), gamma=FRACTIONS, lam=FRACTIONS)
@CHECK
def test_without_gaps_the_two_rules_agree(batch, gamma, lam):
    carried = gae["scan", "carry"](*rvm(batch), gamma=gamma, lam=lam)
    filled = gae["scan", "zero"](*rvm(batch), gamma=gamma, lam=lam)
    close(carried, filled)


@given(batch=batches(), other=batches(), row=st.integers(0, B - 1), lam=FRACTIONS)
@CHECK
def test_rows_do_not_see_each_other(batch, other, row, lam):
    mixed = jax.tree.map(np.copy, other)
    for name in ("rewards", "values", "mask"):
        mixed[name][row] = batch[name][row]
    for form in FORMS:
        alone, among = (
            gae[form, "carry"](*rvm(x), gamma=0.9, lam=lam)[0][row]
            for x in (batch, mixed)
        )
        np.testing.assert_array_equal(alone, among)


# ---- the value of the end ----


@pytest.mark.parametrize("form", FORMS)
@given(batch=batches(), gamma=FRACTIONS, lam=FRACTIONS)
@CHECK
def test_a_value_of_the_end_reaches_back_by_powers(form, batch, gamma, lam):
    # It adds γ · V(s_T) to the last δ, and (γλ)^k of that k real tokens before.
    mask, end = named(batch, "mask", "end_values")
    end = np.where(batch["truncated"], end, 0).astype(np.float32)
    plain, _ = gae[form, "carry"](*rvm(batch), gamma=gamma, lam=lam)
    adv, _ = gae[form, "carry"](*rvm(batch), gamma=gamma, lam=lam, end_values=end)
    tokens_after = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - 1
    reach = np.where(mask, (gamma * lam) ** np.maximum(tokens_after, 0.0), 0)
    close(adv, np.asarray(plain) + gamma * end[:, None] * reach)
    kept = ~batch["truncated"]
    np.testing.assert_array_equal(np.asarray(adv)[kept], np.asarray(plain)[kept])


# ---- λ by length ----


@given(mask=any_masks, alpha=st.floats(1 / 64, 2.0, width=32))
@CHECK
def test_lambda_by_length(mask, alpha):
    lam = np.asarray(length_adaptive_lam(mask, alpha=alpha))
    assert lam.dtype == np.float32
    for row, got in zip(mask, lam, strict=True):
        length = int(row.sum())
        want = 0.0 if alpha * length <= 1 else 1 - 1 / (alpha * length)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert 0 <= got < 1


def test_lambda_by_length_at_its_marks():
    # α = 0.05: 0 up to 20 tokens, a single one and none included; 1 − 1/1.5; 1 − 1/5.
    lengths = np.array([0, 1, 20, 30, 100])
    lam = length_adaptive_lam(np.arange(100) < lengths[:, None], alpha=0.05)
    np.testing.assert_allclose(lam, [0, 0, 0, 1 / 3, 0.8], rtol=1e-5, atol=1e-6)


@given(batch=batches(), gamma=FRACTIONS, lam=FRACTIONS)
@CHECK
def test_one_lambda_in_every_row_is_one_lambda(batch, gamma, lam):
    rows = np.full(B, lam, np.float32)
    got = gae["scan", "carry"](*rvm(batch), gamma=gamma, lam=rows)
    want = gae["scan", "carry"](*rvm(batch), gamma=gamma, lam=lam)
    close(got, want)
