"""`adapters.py`: a function of whole sequences serves as well as a cached model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from bare_models import bigram_logits, left_padded

from rlhf_jax.algo.types import Prompts
from rlhf_jax.models.callables import policy
from rlhf_jax.models.tiny import tiny_gpt2
from rlhf_jax.rollout import (
    generate,
    token_logprobs_from_logits,
    uncached_decoding,
    values_from_sequence,
)


def test_decoding_without_a_cache_is_decoding_with_one():
    module, params = tiny_gpt2(vocab_size=40, max_positions=16)
    cached = policy(module)
    prefill, decode = uncached_decoding(
        lambda params, tokens, mask: module.apply({"params": params}, tokens, mask)
    )
    tokens, lengths = left_padded([[5, 11, 2, 38], [9], [14, 31]], width=4, pad=33)
    prompts = Prompts(tokens=tokens, lengths=lengths)
    options = {"max_new_tokens": 5, "stop_ids": (3, 17, 30)}

    def sample(prefill, decode):
        fn = jax.jit(partial(generate, prefill=prefill, decode=decode, **options))
        return fn(jax.random.key(4), params, prompts)

    got, want = sample(prefill, decode), sample(cached.prefill, cached.decode)
    np.testing.assert_array_equal(got.responses, want.responses)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    # Whole networks, another order of summation.
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-5)


def test_logprobs_and_entropies_of_the_response():
    table = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
    tokens = np.array([[4, 1, 8, 8, 2], [0, 3, 5, 7, 6]], np.int32)
    fn = token_logprobs_from_logits(bigram_logits)
    logprobs, entropies = fn(
        jnp.asarray(table),
        jnp.asarray(tokens),
        jnp.ones((2, 5), bool),
        response_length=3,
        temperature=0.5,
    )
    # Response tokens are columns 2, 3, 4; each is drawn after the one before it.
    before = table[tokens[:, 1:4]] / 0.5
    want = np.take_along_axis(oracles.log_softmax(before), tokens[:, 2:, None], axis=2)
    np.testing.assert_allclose(logprobs, want[..., 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropies, oracles.entropy(before), rtol=1e-5, atol=1e-6)


def test_values_are_read_before_each_response_token():
    def running_sum(scale, tokens, mask):
        return (scale * jnp.cumsum(tokens, axis=1)).astype(jnp.bfloat16)

    tokens = jnp.array([[3, 1, 4, 1, 5]])
    values = values_from_sequence(running_sum)(
        jnp.float32(0.5), tokens, jnp.ones((1, 5), bool), response_length=3
    )
    # Read through column 1, 2 and 3: (3+1)/2, (3+1+4)/2, (3+1+4+1)/2.
    np.testing.assert_array_equal(values, [[2.0, 4.0, 4.5]])
    assert values.dtype == jnp.float32
