"""`scoring.py`: one temperature, values before tokens, scores at the last token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from bare_models import bigram_logits, left_padded

from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.models.callables import critic, policy, reward_model
from rlhf_jax.models.tiny import tiny_gpt2
from rlhf_jax.rollout import (
    generate,
    score_rollout,
    token_logprobs_from_logits,
    values_from_sequence,
)

V, P, T = 20, 4, 5


@pytest.fixture(scope="module")
def rollout():
    """Prompts of 4, 1 and 2 tokens, answers of 5, 1 and 3, as if drawn by someone."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, V, n).tolist() for n in (4, 1, 2)]
    tokens, lengths = left_padded(rows, width=P)
    return Rollout(
        prompts=Prompts(tokens=tokens, lengths=lengths),
        responses=jnp.asarray(rng.integers(0, V, (3, T)), jnp.int32),
        lengths=jnp.array([5, 1, 3]),
        truncated=jnp.array([True, False, False]),
        logprobs=jnp.asarray(rng.normal(-2, 0.5, (3, T)), jnp.float32),
    )


def last_embedding(weights, tokens, mask):
    """A critic: the weight of the token just read."""
    return weights[tokens]


score_bare = partial(
    score_rollout,
    token_logprobs_fn=token_logprobs_from_logits(bigram_logits),
    values_fn=values_from_sequence(last_embedding),
)


@pytest.fixture(scope="module")
def said():
    """Parameters of three models, and the scores of the answers."""
    rng = np.random.default_rng(2)
    tables = rng.normal(size=(2, V, V)).astype(np.float32)
    return {
        "actor": tables[0],
        "reference": tables[1],
        "critic": rng.normal(size=V).astype(np.float32),
        "scores": np.array([0.5, -1.25, 0.75], np.float32),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_each_model_says_its_part(rollout, said, temperature):
    params = jax.tree.map(jnp.asarray, said)
    scored = score_bare(**params, rollout=rollout, temperature=temperature)
    tokens = np.asarray(rollout.tokens)
    before, drawn = tokens[:, P - 1 : -1], tokens[:, P:, None]
    for got, table in (
        (scored.logprobs, said["actor"]),
        (scored.ref_logprobs, said["reference"]),
    ):
        logprobs = oracles.log_softmax(table[before] / temperature)
        want = np.take_along_axis(logprobs, drawn, axis=2)[..., 0]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # No temperature here.
    np.testing.assert_array_equal(scored.values, said["critic"][before])
    np.testing.assert_array_equal(scored.scores, said["scores"])
    assert scored.scores.dtype == jnp.float32


def test_the_samplers_logprobs_may_stand(rollout, said):
    params = jax.tree.map(jnp.asarray, said) | {"actor": None}
    scored = score_bare(**params, rollout=rollout)
    np.testing.assert_array_equal(scored.logprobs, rollout.logprobs)


def test_no_gradient_flows_through_the_record(rollout, said):
    def total(params):
        scored = score_bare(**params, rollout=rollout)
        return sum(
            jnp.sum(x)
            for x in (
                scored.logprobs,
                scored.ref_logprobs,
                scored.values,
                scored.scores,
            )
        )

    grads = jax.grad(total)(jax.tree.map(jnp.asarray, said))
    for grad in jax.tree.leaves(grads):
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))


# ---- transformers ----


@pytest.fixture(scope="module")
def tiny():
    make = partial(tiny_gpt2, vocab_size=V, max_positions=16)
    return {
        head: make(head, seed=i) for i, head in enumerate(("lm", "value", "reward"))
    }


@pytest.fixture(scope="module")
def score_tiny(tiny):
    """`(actor, critic, reference, reward, rollout, temperature) -> ScoredRollout`."""
    score_fn = reward_model(tiny["reward"][0])

    def score(actor, critic_params, reference, reward, rollout, temperature):
        return score_rollout(
            actor,
            critic_params,
            reference,
            score_fn(reward, rollout.tokens, rollout.sequence_mask),
            rollout,
            token_logprobs_fn=policy(tiny["lm"][0]).token_logprobs,
            values_fn=critic(tiny["value"][0]),
            temperature=temperature,
        )

    return jax.jit(score)


@pytest.fixture(scope="module")
def sample(tiny):
    callables = policy(tiny["lm"][0])
    return jax.jit(
        partial(
            generate,
            prefill=callables.prefill,
            decode=callables.decode,
            max_new_tokens=T,
            stop_ids=(3, 7, 11),
        )
    )


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_an_actor_equal_to_its_reference_has_no_kl(
    tiny, sample, score_tiny, rollout, temperature
):
    params = tiny["lm"][1]
    drawn = sample(jax.random.key(0), params, rollout.prompts, temperature=temperature)
    others = (tiny["value"][1], params, tiny["reward"][1], drawn)
    scored = score_tiny(params, *others, temperature)
    np.testing.assert_array_equal(scored.logprobs, scored.ref_logprobs)
    mask = np.asarray(drawn.mask)
    # Also of the sampler's own: whole networks, another order of summation.
    np.testing.assert_allclose(
        np.asarray(drawn.logprobs)[mask],
        np.asarray(scored.ref_logprobs)[mask],
        rtol=1e-4,
        atol=1e-5,
    )


def test_values_and_scores_read_what_they_should(tiny, score_tiny, rollout):
    scored = score_tiny(
        tiny["lm"][1], tiny["value"][1], tiny["lm"][1], tiny["reward"][1], rollout, 1.0
    )
    module, params = tiny["value"]
    of_prompts = jax.jit(module.apply)(
        {"params": params}, rollout.prompts.tokens, rollout.prompts.mask
    )
    # The first value has read the prompt and nothing else.
    np.testing.assert_allclose(scored.values[:, 0], of_prompts[:, -1], rtol=1e-4)

    # The score is that of the text without any padding.
    module, params = tiny["reward"]
    for row in (0, 1):
        text = rollout.tokens[row][rollout.sequence_mask[row]][None]
        alone = jax.jit(module.apply)(
            {"params": params}, text, jnp.ones_like(text, bool)
        )
        np.testing.assert_allclose(scored.scores[row], alone[0], rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter(tiny, score_tiny, rollout):
    params = [tiny[head][1] for head in ("lm", "value", "lm", "reward")]
    want = score_tiny(*params, rollout, 1.0)
    dirty = Rollout(
        prompts=Prompts(
            tokens=jnp.where(rollout.prompts.mask, rollout.prompts.tokens, V - 1),
            lengths=rollout.prompts.lengths,
        ),
        responses=jnp.where(rollout.mask, rollout.responses, V - 1),
        lengths=rollout.lengths,
        truncated=rollout.truncated,
        logprobs=jnp.where(rollout.mask, rollout.logprobs, jnp.nan),
    )
    got = score_tiny(*params, dirty, 1.0)
    mask = np.asarray(rollout.mask)
    for name in ("logprobs", "ref_logprobs", "values"):
        ours, theirs = np.asarray(getattr(got, name)), np.asarray(getattr(want, name))
        np.testing.assert_array_equal(ours[mask], theirs[mask])
    np.testing.assert_array_equal(got.scores, want.scores)
