"""`logprobs.py` against float64 NumPy and optax, and the fused form against both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from rlhf_jax.algo.logprobs import (
    before_response,
    fused_token_logprobs,
    soft_cap,
    token_entropy,
    token_logprobs,
)

B, T, D, V = 3, 5, 4, 11
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def logits(rng):
    return jnp.array(rng.normal(0, 3, (B, T, V)), jnp.float32)


@pytest.fixture
def tokens(rng):
    return jnp.array(rng.integers(0, V, (B, T)), jnp.int32)


@pytest.fixture
def hidden(rng):
    return jnp.array(rng.normal(size=(B, T, D)), jnp.float32)


@pytest.fixture
def unembedding(rng):
    return jnp.array(rng.normal(size=(D, V)), jnp.float32)


def test_before_response_by_hand(maybe_jit):
    # Prompt of 2, response of 3: tokens 2, 3, 4 are chosen from columns 1, 2, 3.
    x = jnp.array([[0.5, 1.5, 2.5, 3.5, 4.5]])
    fn = maybe_jit(functools.partial(before_response, response_length=3))
    np.testing.assert_array_equal(fn(x), [[1.5, 2.5, 3.5]])
    deep = jnp.broadcast_to(x[:, :, None], (1, 5, 2))
    assert fn(deep).shape == (1, 3, 2)
    np.testing.assert_array_equal(fn(deep)[:, :, 0], fn(x))


@pytest.mark.parametrize("length", [0, 5, 6])
def test_before_response_needs_a_column_before(length):
    with pytest.raises(ValueError, match=f"response_length={length}.*between 1 and 4"):
        before_response(jnp.zeros((1, 5)), length)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_match_numpy(maybe_jit, logits, tokens, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    want = np.take_along_axis(
        oracles.log_softmax(scaled), np.asarray(tokens)[..., None], axis=-1
    )[..., 0]
    fn = maybe_jit(token_logprobs)
    got = fn(logits, tokens, temperature=temperature)
    np.testing.assert_allclose(got, want, **TOLERANCE)
    got = maybe_jit(token_entropy)(logits, temperature=temperature)
    np.testing.assert_allclose(got, oracles.entropy(scaled), **TOLERANCE)


def test_logprobs_match_optax(logits, tokens):
    def ours(x):
        return -token_logprobs(x, tokens)

    def theirs(x):
        return optax.softmax_cross_entropy_with_integer_labels(x, tokens)

    np.testing.assert_allclose(ours(logits), theirs(logits), **TOLERANCE)
    got, want = (jax.grad(lambda x, f=f: jnp.sum(f(x)))(logits) for f in (ours, theirs))
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_excluded_tokens_count_for_nothing():
    # Two tokens of probability ½ each and one excluded: H = log 2.
    logits = jnp.array([[[0.3, -np.inf, 0.3]]])
    np.testing.assert_allclose(token_entropy(logits), [[np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(
        token_logprobs(logits, jnp.array([[2]])), [[-np.log(2)]], rtol=1e-6
    )
    grad = jax.grad(lambda x: jnp.sum(token_entropy(x)))(logits)
    np.testing.assert_allclose(grad, np.zeros((1, 1, 3)), atol=1e-6)


def test_entropy_bounds():
    flat, peaked = jnp.zeros((1, 1, V)), jnp.zeros((1, 1, V)).at[0, 0, 2].set(1e4)
    np.testing.assert_allclose(token_entropy(flat), [[np.log(V)]], rtol=1e-6)
    assert 0 <= float(token_entropy(peaked)[0, 0]) < 1e-6


def test_half_precision_logits_are_read_as_float32(logits, tokens):
    low = logits.astype(jnp.bfloat16)
    got = token_logprobs(low, tokens)
    assert got.dtype == token_entropy(low).dtype == jnp.float32
    np.testing.assert_array_equal(got, token_logprobs(low.astype(jnp.float32), tokens))


def test_integer_logits_and_float_tokens_are_refused(logits, tokens):
    with pytest.raises(AssertionError, match="type"):
        token_logprobs(logits.astype(jnp.int32), tokens)
    with pytest.raises(AssertionError, match="type"):
        token_logprobs(logits, tokens.astype(jnp.float32))


def plain(hidden, unembedding, tokens, temperature=1.0):
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding)
    return (
        token_logprobs(logits, tokens, temperature=temperature),
        token_entropy(logits, temperature=temperature),
    )


# 15 tokens in one chunk, one exact and one padded split, and one by one.
@pytest.mark.parametrize("chunk_size", [15, 5, 4, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_matches_plain(
    maybe_jit, rng, hidden, unembedding, tokens, chunk_size, temperature
):
    weights = jnp.array(rng.normal(size=(2, B, T)), jnp.float32)
    fused = functools.partial(fused_token_logprobs, chunk_size=chunk_size)

    def total(fn, hidden, unembedding):
        results = fn(hidden, unembedding, tokens, temperature=temperature)
        return sum(jnp.sum(w * x) for w, x in zip(weights, results, strict=True))

    got = maybe_jit(fused)(hidden, unembedding, tokens, temperature=temperature)
    want = plain(hidden, unembedding, tokens, temperature)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)
    got, want = (
        maybe_jit(jax.grad(functools.partial(total, fn), argnums=(0, 1)))(
            hidden, unembedding
        )
        for fn in (fused, plain)
    )
    # Sums of 15 terms over the tokens, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
    )


def test_soft_cap_by_hand():
    # 30 · tanh(30 / 30) = 30 · 0.761594 = 22.8478; far beyond the cap it is the cap.
    capped = soft_cap(jnp.array([0.0, 30.0, -30.0, 3000.0]), 30.0)
    np.testing.assert_allclose(capped, [0.0, 22.8478, -22.8478, 30.0], rtol=1e-5)
    assert soft_cap(jnp.array([5.0]), None)[0] == 5.0


def test_fused_caps_logits_before_the_temperature(hidden, unembedding, tokens):
    weights = jnp.array(np.random.default_rng(5).normal(size=(2, B, T)), jnp.float32)

    def plain_capped(hidden, unembedding):
        logits = 1.5 * jnp.tanh((hidden @ unembedding) / 1.5)
        options = {"temperature": 0.7}
        return (
            token_logprobs(logits, tokens, **options),
            token_entropy(logits, **options),
        )

    def fused_capped(hidden, unembedding):
        return fused_token_logprobs(
            hidden, unembedding, tokens, temperature=0.7, softcap=1.5, chunk_size=4
        )

    def total(fn, *args):
        return sum(jnp.sum(w * x) for w, x in zip(weights, fn(*args), strict=True))

    got, want = (fn(hidden, unembedding) for fn in (fused_capped, plain_capped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), got, want)
    got, want = (
        jax.grad(functools.partial(total, fn), argnums=(0, 1))(hidden, unembedding)
        for fn in (fused_capped, plain_capped)
    )
    # Sums of 15 terms over the tokens, in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
    )


@pytest.mark.parametrize("which", [0, 1])
def test_fused_gradient_matches_finite_differences(hidden, unembedding, tokens, which):
    fn = functools.partial(fused_token_logprobs, chunk_size=4)
    direction = jnp.array(np.random.default_rng(3).normal(size=(D, V)), jnp.float32)

    def along(step):
        return jnp.sum(fn(hidden, unembedding + step * direction, tokens)[which])

    numeric = (along(1e-2) - along(-1e-2)) / 2e-2
    # Differences of float32 sums of size 50, over a step of 0.02.
    np.testing.assert_allclose(jax.grad(along)(0.0), numeric, rtol=2e-2, atol=2e-2)


def test_fused_takes_mixed_precision(hidden, unembedding, tokens):
    low = hidden.astype(jnp.bfloat16)
    rounded = unembedding.astype(jnp.bfloat16).astype(jnp.float32)

    def total(hidden, unembedding):
        results = fused_token_logprobs(hidden, unembedding, tokens, chunk_size=4)
        assert all(x.dtype == jnp.float32 for x in results)
        return jnp.sum(results[0]) + jnp.sum(results[1])

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(low, unembedding)
    want, want_grads = jax.value_and_grad(total, argnums=(0, 1))(
        low.astype(jnp.float32), rounded
    )
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    for got, exact in zip(grads, want_grads, strict=True):
        # bfloat16 keeps 8 bits of the cotangents.
        np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2e-2, atol=2e-2)


def test_fused_accumulates_weight_gradients_in_float32():
    # 512 equal tokens in 512 chunks: each adds g to a gradient that grows to 512·g;
    # a bfloat16 sum stops growing at 256·g.
    hidden = jnp.ones((1, 512, 1), jnp.bfloat16)
    unembedding = jnp.zeros((1, 2), jnp.bfloat16)
    tokens = jnp.zeros((1, 512), jnp.int32)
    grad = jax.grad(
        lambda w: jnp.sum(fused_token_logprobs(hidden, w, tokens, chunk_size=1)[0])
    )(unembedding)
    np.testing.assert_array_equal(grad.astype(jnp.float32), [[256.0, -256.0]])


def test_fused_ignores_hidden_states_of_unused_tokens(hidden, unembedding, tokens):
    mask = jnp.arange(T)[None, :] < jnp.array([[1], [3], [5]])
    dirty = jnp.where(mask[:, :, None], hidden, np.nan)

    def total(hidden, unembedding):
        results = fused_token_logprobs(hidden, unembedding, tokens, chunk_size=4)
        return sum(jnp.sum(jnp.where(mask, x, 0.0)) for x in results)

    got = jax.grad(total, argnums=(0, 1))(dirty, unembedding)
    want = jax.grad(total, argnums=(0, 1))(hidden, unembedding)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_fused_entropy_is_within_bounds(rng, tokens):
    hidden = jnp.array(rng.normal(0, 100, (B, T, D)), jnp.float32)
    unembedding = jnp.array(rng.normal(0, 100, (D, V)), jnp.float32)
    _, entropy = fused_token_logprobs(hidden, unembedding, tokens)
    assert np.all(entropy >= 0) and np.all(entropy <= np.log(V) * (1 + 1e-6))


def test_fused_never_holds_all_logits():
    tokens, vocabulary, chunk = 512, 4096, 32
    args = (
        jax.ShapeDtypeStruct((8, 64, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((8, 64), jnp.int32),
    )

    def grads(hidden, unembedding, tokens):
        def total(*weights):
            results = fused_token_logprobs(*weights, tokens, chunk_size=chunk)
            return jnp.sum(results[0] + results[1])

        return jax.grad(total, argnums=(0, 1))(hidden, unembedding)

    held = jax.jit(grads).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert held < tokens * vocabulary * 4 / 2
    # A few copies of one chunk's logits, and the float32 gradient of the weights.
    assert held < 6 * chunk * vocabulary * 4 + 4 * 16 * vocabulary * 4


def test_fused_temperature_may_be_traced_and_gets_no_gradient(
    hidden, unembedding, tokens
):
    def total(temperature):
        return jnp.sum(
            fused_token_logprobs(hidden, unembedding, tokens, temperature=temperature)[
                0
            ]
        )

    want = jnp.sum(plain(hidden, unembedding, tokens, 0.7)[0])
    np.testing.assert_allclose(jax.jit(total)(jnp.float32(0.7)), want, rtol=1e-5)
    assert jax.grad(total)(0.7) == 0


def test_fused_names_a_wrong_chunk_size(hidden, unembedding, tokens):
    with pytest.raises(ValueError, match="chunk_size=0"):
        fused_token_logprobs(hidden, unembedding, tokens, chunk_size=0)


def test_fused_has_first_derivatives_in_reverse_only(rng):
    """What the docstring says of other derivatives than the first in reverse."""
    hidden = jnp.asarray(rng.normal(size=(1, 2, 3)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    tokens = jnp.array([[1, 4]])

    def fused(hidden):
        return fused_token_logprobs(hidden, weights, tokens)[0]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(fused, (hidden,), (hidden,))

    def error(hidden):  # ½ (log π − where it is)², whose cotangent is 0 here
        here = jax.lax.stop_gradient(fused(hidden))
        return 0.5 * jnp.sum((fused(hidden) - here) ** 2)

    assert not jax.hessian(error)(hidden).any()  # J Jᵀ by `token_logprobs`
