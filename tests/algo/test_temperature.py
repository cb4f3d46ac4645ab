"""Wherever a temperature enters, a number that gives no distribution is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.logprobs import fused_token_logprobs, token_entropy, token_logprobs
from rlhf_jax.algo.sampling import sample_token, transform_logits
from rlhf_jax.algo.types import Prompts
from rlhf_jax.rollout.decoding import generate

LOGITS = jnp.array([[0.5, 2.5, -1.0], [1.5, 0.5, 1.5]])
TOKENS = jnp.array([[1], [0]])


def answers(**options):
    """Two tokens after each of two prompts, of a model that puts out `LOGITS`."""
    prompts = Prompts(tokens=TOKENS, lengths=jnp.array([1, 1]))
    return generate(
        jax.random.key(0),
        None,
        prompts,
        prefill=lambda *_, cache_length: (LOGITS, None),
        decode=lambda *_: (LOGITS, None),
        max_new_tokens=2,
        stop_ids=(),
        **options,
    )


SAMPLING = {
    "transform_logits": functools.partial(transform_logits, LOGITS),
    "sample_token": functools.partial(sample_token, jax.random.key(0), LOGITS),
    "generate": answers,
}
LEARNING = {
    "token_logprobs": functools.partial(token_logprobs, LOGITS[:, None], TOKENS),
    "token_entropy": functools.partial(token_entropy, LOGITS[:, None]),
    "fused_token_logprobs": functools.partial(
        fused_token_logprobs, LOGITS[:, None], jnp.eye(3), TOKENS
    ),
}
WRONG = [-1, -0.5, np.float32(-0.5), float("nan"), np.float64("nan"), float("inf")]


@pytest.mark.parametrize("value", [*WRONG, 1e-50, np.float64(1e-300)])
@pytest.mark.parametrize("name", SAMPLING | LEARNING)
def test_what_gives_no_distribution_is_refused(name, value):
    with pytest.raises(ValueError, match=f"temperature={value}: expected") as caught:
        (SAMPLING | LEARNING)[name](temperature=value)
    assert "\n" not in str(caught.value)
    assert ("or 0 for greedy" in str(caught.value)) == (name in SAMPLING)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.int64(0)])
@pytest.mark.parametrize("name", LEARNING)
def test_zero_gives_no_logprobs(name, zero):
    with pytest.raises(ValueError, match=f"temperature={zero}: expected"):
        LEARNING[name](temperature=zero)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.float64(0), np.int64(0)])
def test_zero_of_any_kind_takes_the_likeliest_token(maybe_jit, zero):
    # The largest logit of each row; in the second, the first of two.
    fn = functools.partial(sample_token, temperature=zero)
    tokens, logprobs = maybe_jit(fn)(jax.random.key(0), LOGITS)
    np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_array_equal(logprobs, [0.0, 0.0])
    rollout = answers(temperature=zero)
    np.testing.assert_array_equal(rollout.responses, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(rollout.logprobs, np.zeros((2, 2)))


@pytest.mark.parametrize("temperature", [0.009, 1e-10])
@pytest.mark.parametrize("name", LEARNING)
def test_what_rounding_would_spoil_is_refused(name, temperature):
    with pytest.raises(ValueError, match=r"expected at least 0\.01, and finite$"):
        LEARNING[name](temperature=temperature)


def test_the_lowest_temperature_to_learn_from(maybe_jit):
    # The likeliest token has everything; in the second row two share it.
    fns = {
        name: functools.partial(fn, temperature=0.01) for name, fn in LEARNING.items()
    }
    got = maybe_jit(lambda: {name: fn() for name, fn in fns.items()})()
    want = [[0.0], [np.log(0.5)]], [[0.0], [np.log(2)]]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(got["token_logprobs"], want[0])
    close(got["token_entropy"], want[1])
    jax.tree.map(close, got["fused_token_logprobs"], want)


def test_generate_refuses_before_it_calls_the_model():
    def fail(*_, **__):
        raise AssertionError("called")

    prompts = Prompts(tokens=TOKENS, lengths=jnp.array([1, 1]))
    for name, value in {"temperature": -1.0, "top_p": 2.0, "min_p": -1.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}: expected"):
            generate(
                jax.random.key(0),
                None,
                prompts,
                prefill=fail,
                decode=fail,
                max_new_tokens=2,
                stop_ids=(),
                **{name: value},
            )


def test_generate_with_64_bit_types_on():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rollout = answers(temperature=np.float64(1e-3), pad_id=np.int64(2))
        assert rollout.responses.dtype == jnp.int32
        assert rollout.logprobs.dtype == jnp.float32
        assert rollout.lengths.dtype == jnp.int32
    # e^2000 times likelier than the others.
    np.testing.assert_array_equal(rollout.responses[0], [1, 1])
