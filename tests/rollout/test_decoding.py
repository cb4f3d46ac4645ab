"""`generate.py`: what is sampled, when it ends, and what its log-probabilities are.

Mostly on a bigram table, whose answers can be followed by hand; the properties that
involve a cache on tiny transformers.
"""

import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from bare_models import bigram_decode, bigram_prefill, left_padded
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.algo.types import Prompts
from rlhf_jax.models.callables import policy
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama
from rlhf_jax.rollout import generate
from rlhf_jax.run.devices import make_mesh, put_batch

V = 12
bigram = partial(generate, prefill=bigram_prefill, decode=bigram_decode)


def sampler(function=bigram, **options):
    return jax.jit(partial(function, **options))


def prompts_of(*rows, width=None, pad=0):
    tokens, lengths = left_padded(rows, width=width or max(map(len, rows)), pad=pad)
    return Prompts(tokens=tokens, lengths=lengths)


@pytest.fixture
def counting():
    """Logits under which the likeliest token is one more than the last, modulo V."""
    return 5.0 * jnp.roll(jnp.eye(V), 1, axis=1)


# ---- where an answer ends ----


@pytest.mark.parametrize("pad_id", [11, 5], ids=["pad apart", "pad is a stop id"])
def test_answers_end_with_their_first_stop_token(counting, pad_id):
    sample = sampler(temperature=0, max_new_tokens=4, stop_ids=(5, 9, 2), pad_id=pad_id)
    prompts = prompts_of([1, 2], [7, 7], [4], [9, 9])
    rollout = sample(jax.random.key(0), counting, prompts)
    p = pad_id
    np.testing.assert_array_equal(
        rollout.responses,
        [[3, 4, 5, p], [8, 9, p, p], [5, p, p, p], [10, 11, 0, 1]],
    )
    np.testing.assert_array_equal(rollout.lengths, [3, 2, 1, 4])
    np.testing.assert_array_equal(rollout.truncated, [False, False, False, True])
    np.testing.assert_array_equal(
        rollout.mask,
        [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    )
    np.testing.assert_array_equal(rollout.sequence_mask[2], [0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(rollout.tokens[0], [1, 2, 3, 4, 5, p])
    assert rollout.responses.dtype == rollout.lengths.dtype == jnp.int32


def test_a_stop_token_in_the_last_column_is_no_truncation(counting):
    sample = sampler(temperature=0, max_new_tokens=3, stop_ids=(5,))
    rollout = sample(jax.random.key(0), counting, prompts_of([2], [3]))
    np.testing.assert_array_equal(rollout.responses, [[3, 4, 5], [4, 5, 0]])
    np.testing.assert_array_equal(rollout.lengths, [3, 2])
    assert not rollout.truncated.any()


def test_without_stop_ids_every_answer_is_truncated(counting):
    sample = sampler(temperature=0, max_new_tokens=3, stop_ids=())
    rollout = sample(jax.random.key(0), counting, prompts_of([2], [11]))
    np.testing.assert_array_equal(rollout.responses, [[3, 4, 5], [0, 1, 2]])
    assert rollout.truncated.all()


@pytest.mark.parametrize(
    ("last", "max_new_tokens", "reads"),
    [
        ((2, 4), 10, 2),  # answers of 3 and 1 tokens; the last one drawn is not read
        ((4, 4), 10, 0),
        ((2, 6), 10, 9),  # 6 never reaches the stop id in 10 tokens
        ((6, 6), 1, 0),
    ],
)
def test_decoding_ends_with_the_last_answer(counting, last, max_new_tokens, reads):
    calls = []

    def decode(table, tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return bigram_decode(table, tokens, cache)

    sample = sampler(
        partial(generate, prefill=bigram_prefill, decode=decode),
        temperature=0,
        max_new_tokens=max_new_tokens,
        stop_ids=(5,),
    )
    rollout = sample(jax.random.key(0), counting, prompts_of(*([x] for x in last)))
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    assert len(calls) == reads
    want = [(5 - x) % V <= max_new_tokens for x in last]
    np.testing.assert_array_equal(~rollout.truncated, want)


def test_a_single_token(counting):
    sample = sampler(temperature=0, max_new_tokens=1, stop_ids=(5,))
    rollout = sample(jax.random.key(0), counting, prompts_of([4], [6, 7]))
    np.testing.assert_array_equal(rollout.responses, [[5], [8]])
    np.testing.assert_array_equal(rollout.lengths, [1, 1])
    np.testing.assert_array_equal(rollout.truncated, [False, True])


def test_no_new_tokens_is_refused(counting):
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        bigram(
            jax.random.key(0),
            counting,
            prompts_of([1]),
            max_new_tokens=0,
            stop_ids=(),
        )


# ---- what is drawn ----


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.4, "top_k": 7, "top_p": 0.8, "min_p": 0.15},
    ],
    ids=lambda options: "+".join(options),
)
def test_logprob_is_that_of_the_distribution_drawn_from(options):
    table = np.random.default_rng(0).normal(0, 1.5, (V, V)).astype(np.float32)
    first = np.arange(V).tolist() * 2
    sample = sampler(max_new_tokens=6, stop_ids=(3,), **options)
    rollout = sample(
        jax.random.key(1), jnp.asarray(table), prompts_of(*([x] for x in first))
    )
    every = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    want = np.zeros(rollout.responses.shape)
    for row, column in np.argwhere(rollout.mask):
        before = first[row] if column == 0 else int(rollout.responses[row, column - 1])
        probs = oracles.truncated_distribution(table[before], **(every | options))
        want[row, column] = np.log(probs[rollout.responses[row, column]])
    np.testing.assert_allclose(rollout.logprobs, want, rtol=1e-5, atol=1e-6)


def test_keys_rows_and_columns_have_noise_of_their_own():
    # Flat logits over many tokens: equal draws are noise that was used twice.
    size, rows, length = 200, 8, 16
    flat = jnp.zeros((size, size))
    sample = sampler(max_new_tokens=length, stop_ids=())
    prompts = prompts_of(*[[7, 7]] * rows)
    text, again, other = (
        np.asarray(sample(jax.random.key(seed), flat, prompts).responses)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(again, text)
    # 128 draws from 200 tokens coincide 0.6 times on average.
    assert (other == text).sum() < 6
    for a in range(rows):
        for b in range(a):
            assert (text[a] == text[b]).sum() < 4
    for a in range(length):
        for b in range(a):
            assert (text[:, a] == text[:, b]).sum() < 4


def test_one_key_gives_one_text_whatever_the_devices():
    table = jnp.asarray(np.random.default_rng(0).normal(0, 1, (V, V)), jnp.float32)
    prompts = prompts_of(*([x, x] for x in range(8)))
    sample = sampler(max_new_tokens=6, stop_ids=(3,))
    want = sample(jax.random.key(2), table, prompts)
    mesh = make_mesh(data=4, fsdp=2)
    got = sample(
        jax.device_put(jax.random.key(2), NamedSharding(mesh, PartitionSpec())),
        jax.device_put(table, NamedSharding(mesh, PartitionSpec())),
        put_batch(mesh, prompts),
    )
    assert len(got.responses.sharding.device_set) == 8
    np.testing.assert_array_equal(got.responses, want.responses)
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-6)


def test_one_shape_compiles_once(counting):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(key, table, prompts, temperature):
        return bigram(
            key,
            table,
            prompts,
            max_new_tokens=4,
            stop_ids=(5,),
            temperature=temperature,
        )

    texts = [
        sample(jax.random.key(seed), counting * seed, prompts_of([seed]), 0.5 + seed)
        for seed in range(3)
    ]
    assert not np.array_equal(texts[0].responses, texts[1].responses)


# ---- transformers ----


@pytest.fixture(scope="module", params=[tiny_gpt2, tiny_llama])
def model(request):
    """Callables, parameters, and a sampler of 6 tokens compiled once per shape."""
    module, params = request.param(vocab_size=40, max_positions=16)
    callables = policy(module)
    sample = sampler(
        partial(generate, prefill=callables.prefill, decode=callables.decode),
        max_new_tokens=6,
        stop_ids=(3, 17, 30),
    )
    return callables, params, sample


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return prompts_of(*(rng.integers(1, 40, n).tolist() for n in (5, 3, 1, 5, 2, 2)))


def test_logprobs_are_those_of_a_full_forward_pass(model, prompts):
    callables, params, sample = model
    rollout = sample(jax.random.key(0), params, prompts, temperature=1.3)
    assert 1 < len(np.unique(rollout.lengths))
    logprobs, _ = jax.jit(
        partial(callables.token_logprobs, response_length=6, temperature=1.3)
    )(params, rollout.tokens, rollout.sequence_mask)
    mask = np.asarray(rollout.mask)
    # Whole networks, another order of summation.
    np.testing.assert_allclose(
        np.asarray(rollout.logprobs)[mask], logprobs[mask], rtol=1e-4, atol=1e-5
    )
    assert np.all(np.asarray(rollout.logprobs)[~mask] == 0)


def test_left_padding_changes_no_answer(model, prompts):
    _, params, sample = model
    # So cold that noise decides nothing: one program for this and the other tests.
    sample = partial(sample, jax.random.key(0), params, temperature=1e-6)
    together = sample(prompts)
    for row in (4, 5):  # those of two tokens
        alone = sample(prompts_of(prompts.tokens[row, -2:].tolist()))
        np.testing.assert_array_equal(together.responses[row], alone.responses[0])
        assert together.lengths[row] == alone.lengths[0]
    assert not np.array_equal(together.responses[4], together.responses[5])


def test_ids_under_the_padding_of_prompts_do_not_matter(model, prompts):
    _, params, sample = model
    dirty = Prompts(
        tokens=jnp.where(prompts.mask, prompts.tokens, 30), lengths=prompts.lengths
    )
    want, got = (
        sample(jax.random.key(0), params, x, temperature=1.3) for x in (prompts, dirty)
    )
    np.testing.assert_array_equal(got.responses, want.responses)
    np.testing.assert_array_equal(got.logprobs, want.logprobs)


def test_the_cache_is_written_in_place(model, prompts):
    callables, params, sample = model
    arguments = (params, prompts.tokens, prompts.mask)
    _, cache = jax.eval_shape(partial(callables.prefill, cache_length=10), *arguments)
    size = cache.keys[0].size

    lowered = sample.lower(jax.random.key(0), params, prompts, temperature=1.3)
    program = lowered.compile().as_text()
    loops = [
        body
        for name in set(re.findall(r"body=%?([\w.\-]+)", program))
        for body in re.findall(rf"^%?{re.escape(name)} .*?^}}", program, re.M | re.S)
        if "dynamic-update-slice" in body
    ]
    assert len(loops) == 1  # the decode loop; the others belong to the noise
    # Whatever the loop makes that is as large as the keys of a layer, in any layout.
    made = [
        name
        for name, shape, op in re.findall(
            r"%?(\S+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\(", loops[0]
        )
        if op not in ("get-tuple-element", "bitcast", "parameter", "constant")
        and math.prod(int(x) for x in shape.split(",") if x) >= size
    ]
    # Keys and values of two layers, each written into the buffer it came in.
    assert len(made) == 4, made
    assert all("dynamic-update-slice" in name for name in made)
