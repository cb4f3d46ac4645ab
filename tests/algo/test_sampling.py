"""`sampling.py` against a NumPy sampler, by counting draws, and by identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax.algo.sampling import sample_token, transform_logits

V = 12
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 3},
    {"top_k": 1},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-3},
    {"top_p": 1.0},
    {"min_p": 0.2},
    {"min_p": 0.0},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.8, "min_p": 0.25},
]


@pytest.fixture
def logits(rng):
    return jnp.array(rng.normal(0, 2, (4, V)), jnp.float32)


def oracle(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    return np.stack(
        [
            oracles.truncated_distribution(x, temperature, top_k, top_p, min_p)
            for x in np.asarray(logits)
        ]
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_distribution_matches_sorting(maybe_jit, logits, options):
    got = maybe_jit(functools.partial(transform_logits, **options))(logits)
    assert got.dtype == jnp.float32
    want = oracle(logits, **options)
    np.testing.assert_array_equal(np.isneginf(got), want == 0)
    np.testing.assert_allclose(jax.nn.softmax(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_logprob_is_that_of_the_distribution_drawn_from(logits, options):
    tokens, logprobs = sample_token(jax.random.key(1), logits, **options)
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    want = np.take_along_axis(oracle(logits, **options), tokens[:, None], axis=1)
    np.testing.assert_allclose(np.exp(logprobs), want[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]])
def test_frequencies(maybe_jit, logits, options):
    draws = 4000
    many = jnp.broadcast_to(logits[:1], (draws, V))
    fn = maybe_jit(functools.partial(sample_token, **options))
    tokens, _ = fn(jax.random.key(2), many)
    frequency = np.bincount(tokens, minlength=V) / draws
    want = oracle(logits[:1], **options)[0]
    assert np.all(frequency[want == 0] == 0)
    # Four standard deviations of a frequency; the key is fixed.
    assert np.all(np.abs(frequency - want) <= 4 * np.sqrt(want * (1 - want) / draws))


def test_nucleus_among_nearly_equal_probabilities():
    # Neighbours differ by 5e-5 of themselves; the 4,382 largest of 10,000 reach 0.5.
    logits = np.linspace(0.25, -0.25, 10_000)[None, :]
    want = oracle(logits, top_p=0.5)
    kept = np.isfinite(transform_logits(jnp.array(logits, jnp.float32), top_p=0.5))
    # float32 sums of 4,382 terms: one token more or less.
    assert (want > 0).sum() == 4382 and abs(kept.sum() - 4382) <= 2
    assert kept[0, : kept.sum()].all()


def test_rows_draw_independently():
    flat = jnp.zeros((64, 1000))
    tokens, _ = sample_token(jax.random.key(3), flat)
    other, _ = sample_token(jax.random.key(4), flat)
    same, _ = sample_token(jax.random.key(3), flat)
    assert len(np.unique(tokens)) > 50
    assert np.mean(np.asarray(tokens) == np.asarray(other)) < 0.1
    np.testing.assert_array_equal(tokens, same)


@pytest.mark.parametrize("temperature", [0, 0.0])
def test_zero_temperature_is_greedy(maybe_jit, temperature):
    # Row 1 ties: the first of the largest.
    logits = jnp.array([[0.5, 2.5, -1.0], [1.5, 0.5, 1.5]])
    fn = functools.partial(sample_token, temperature=temperature, top_p=0.9)
    tokens, logprobs = maybe_jit(fn)(jax.random.key(0), logits)
    np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_array_equal(logprobs, [0.0, 0.0])
    np.testing.assert_array_equal(
        transform_logits(logits, temperature=temperature),
        [[-np.inf, 0, -np.inf], [0, -np.inf, -np.inf]],
    )


def test_top_one_is_greedy(logits):
    tokens, logprobs = sample_token(jax.random.key(5), logits, top_k=1)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))
    np.testing.assert_allclose(logprobs, np.zeros(4), atol=1e-6)


def test_ties_are_kept():
    logits = jnp.array([[1.0, 1.0, 1.0, -2.0]])
    for options in ({"top_k": 2}, {"top_p": 0.4}):
        kept = np.isfinite(transform_logits(logits, **options))
        np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_excluded_tokens_are_never_drawn():
    logits = jnp.full((500, 4), -jnp.inf).at[:, 2].set(-7.5)
    tokens, logprobs = sample_token(jax.random.key(6), logits)
    np.testing.assert_array_equal(tokens, np.full(500, 2))
    np.testing.assert_array_equal(logprobs, np.zeros(500))


def test_options_may_be_traced(logits):
    options = {"temperature": 0.8, "top_p": 0.7, "min_p": 0.1}
    traced = {name: jnp.float32(x) for name, x in options.items()}
    got = jax.jit(transform_logits)(logits, **traced)
    np.testing.assert_allclose(got, transform_logits(logits, **options), rtol=1e-5)


def test_half_precision_logits_are_read_as_float32(logits):
    low = logits.astype(jnp.bfloat16)
    got = sample_token(jax.random.key(7), low, top_p=0.9)
    want = sample_token(jax.random.key(7), low.astype(jnp.float32), top_p=0.9)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.5),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_wrong_options_are_named(logits, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}: expected"):
        sample_token(jax.random.key(0), logits, **{option: value})


def test_integer_logits_are_refused():
    with pytest.raises(AssertionError, match="type"):
        transform_logits(jnp.array([[1, 2]]))
