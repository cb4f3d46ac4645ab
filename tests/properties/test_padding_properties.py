"""Where the padding sits and what ids it holds, from networks to experience."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import context_logits, context_params, context_values
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import CHECK, TOLERANCE

from rlhf_jax.algo.masking import response_mask
from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama
from rlhf_jax.rollout import (
    make_experience,
    score_rollout,
    token_logprobs_from_logits,
    values_from_sequence,
)

V, B, P, T = 9, 3, 4, 5
STOP = 2


def ids(*shape):
    size = int(np.prod(shape))
    return st.binary(min_size=size, max_size=size).map(
        lambda raw: (np.frombuffer(raw, np.uint8) % V).astype(np.int32).reshape(shape)
    )


# ---- networks ----


@pytest.fixture(scope="module", params=[tiny_gpt2, tiny_llama])
def outputs(request):
    """`(tokens, mask) -> (logits, values)` of two transformers of one family."""
    lm, lm_params = request.param(vocab_size=V, max_positions=16)
    critic, critic_params = request.param("value", vocab_size=V, max_positions=16)

    @jax.jit
    def forward(tokens, mask):
        logits = lm.apply({"params": lm_params}, tokens, mask)
        values = critic.apply({"params": critic_params}, tokens, mask)
        return logits, values

    return forward


@given(
    tokens=ids(B, 10),
    garbage=ids(B, 10),
    lengths=st.lists(st.integers(1, 10), min_size=B, max_size=B),
    share=st.lists(st.floats(0, 1), min_size=B, max_size=B),
)
@CHECK
def test_text_may_start_in_any_column(outputs, tokens, garbage, lengths, share):
    """Padding on the left, on the right, or on both sides of a text."""
    results = []
    for shares in (np.zeros(B), np.array(share)):
        placed, mask = garbage.copy(), np.zeros(tokens.shape, bool)
        for b, (length, part) in enumerate(zip(lengths, shares, strict=True)):
            start = round(part * (10 - length))
            placed[b, start : start + length] = tokens[b, :length]
            mask[b, start : start + length] = True
        results.append([np.asarray(x)[mask] for x in outputs(placed, mask)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# ---- prompts and answers to experience ----


@pytest.fixture(scope="module")
def experience_of():
    """`(prompts, prompt lengths, responses) -> Experience` under small bare models."""
    actor, critic = context_params(jax.random.key(0), vocab_size=V, width=4)
    reference, _ = context_params(jax.random.key(1), vocab_size=V, width=4)

    def compute(prompts, lengths, responses):
        mask = response_mask(responses, stop_ids=STOP)
        rollout = Rollout(
            prompts=Prompts(tokens=prompts, lengths=lengths),
            responses=responses,
            lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
            truncated=~jnp.any(responses == STOP, axis=1),
            logprobs=jnp.zeros(mask.shape),
        )
        text = jnp.where(rollout.sequence_mask, rollout.tokens, 0)
        worth = jnp.sum(text, axis=1, dtype=jnp.int32)
        scored = score_rollout(
            actor,
            critic,
            reference,
            worth.astype(jnp.float32) / 7.0,
            rollout,
            token_logprobs_fn=token_logprobs_from_logits(context_logits),
            values_fn=values_from_sequence(context_values),
        )
        return make_experience(scored, kl_coef=0.25)

    return jax.jit(compute)


prompt_lengths = st.lists(st.integers(1, P), min_size=B, max_size=B).map(
    lambda lengths: np.array(lengths, np.int32)
)
ARRAYS = ("mask", "old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")


def padded_with(prompts, lengths, responses, pad):
    """The same texts, with this id before every prompt and after every stop token."""
    real = np.arange(P) >= P - lengths[:, None]
    mask = np.asarray(response_mask(jnp.asarray(responses), stop_ids=STOP))
    return np.where(real, prompts, pad), lengths, np.where(mask, responses, pad)


@given(
    prompts=ids(B, P),
    lengths=prompt_lengths,
    responses=ids(B, T),
    pads=st.permutations(range(V)),
)
@CHECK
def test_a_pad_id_may_be_any_id(experience_of, prompts, lengths, responses, pads):
    # The stop id among them, and ids that stand inside the prompts.
    texts = (prompts.astype(np.int32), lengths, responses)
    want = experience_of(*padded_with(*texts, V - 1))
    for pad in (STOP, *pads[:2]):
        got = experience_of(*padded_with(*texts, np.int32(pad)))
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(got[0], name), getattr(want[0], name))
        jax.tree.map(np.testing.assert_array_equal, got[1], want[1])


@given(
    prompts=ids(B, P),
    lengths=prompt_lengths,
    responses=ids(B, T),
    columns=ids(B, 2),
)
@CHECK
def test_columns_before_the_prompts_change_nothing(
    experience_of, prompts, lengths, responses, columns
):
    want, metrics = experience_of(prompts, lengths, responses)
    wide = np.concatenate([columns, prompts], axis=1)
    got, wide_metrics = experience_of(wide, lengths, responses)
    close = partial(np.testing.assert_allclose, **TOLERANCE)
    for name in ARRAYS:
        close(getattr(got, name), getattr(want, name))
    jax.tree.map(close, wide_metrics, metrics)
