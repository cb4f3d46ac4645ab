"""`scoring.py`: end values, a slow critic, and answers that go on past their stop."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import context_logits, context_params, context_values, left_padded

from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.recipes.scorer import reward_model_program
from rlhf_jax.rollout import (
    score_rollout,
    token_logprobs_from_logits,
    values_from_sequence,
)
from rlhf_jax.rollout.scoring import mark_stops

V, P, T = 9, 3, 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


score = jax.jit(
    partial(
        score_rollout,
        token_logprobs_fn=token_logprobs_from_logits(context_logits),
        values_fn=values_from_sequence(context_values),
        scores=jnp.array([0.5, -1.25, 0.75]),
    ),
    static_argnames="with_end_values",
)


def mean_id(_, tokens, mask):
    """A reward model: the mean id of what it reads."""
    return jnp.sum(jnp.where(mask, tokens, 0), axis=1) / jnp.sum(mask, axis=1)


READER = SimpleNamespace(score_fn=mean_id)


@pytest.fixture(scope="module")
def models():
    actor, critic = context_params(jax.random.key(0), vocab_size=V, width=4)
    reference, slow = context_params(jax.random.key(1), vocab_size=V, width=4)
    return {"actor": actor, "critic": critic, "reference": reference}, slow


@pytest.fixture(scope="module")
def rollout():
    """Two answers that were cut off, and one that stopped after two tokens."""
    tokens, lengths = left_padded([[3, 1, 4], [1], [5, 8]], width=P)
    return Rollout(
        prompts=Prompts(tokens=tokens, lengths=lengths),
        responses=jnp.array([[7, 1, 6, 4], [3, 3, 8, 5], [6, 2, 7, 7]], jnp.int32),
        lengths=jnp.array([4, 4, 2]),
        truncated=jnp.array([True, True, False]),
        logprobs=jnp.full((3, T), -1.5),
    )


def continued(rollout):
    """The same answers, with another real token at their end."""
    return dataclasses.replace(
        rollout,
        responses=jnp.pad(rollout.responses, ((0, 0), (0, 1)), constant_values=5),
        lengths=rollout.lengths + 1,
        logprobs=jnp.pad(rollout.logprobs, ((0, 0), (0, 1))),
    )


# ---- values ----


def test_the_value_of_the_end_is_that_before_one_token_more(models, rollout):
    params, _ = models
    scored = score(**params, rollout=rollout, with_end_values=True)
    longer = score(**params, rollout=continued(rollout))
    cut = np.array([0, 1])  # only these go on after the last column
    np.testing.assert_allclose(
        scored.end_values[cut], longer.values[cut, T], **TOLERANCE
    )
    assert scored.end_values.shape == (3,)
    assert np.isfinite(scored.end_values).all()
    # All else is as without it.
    plain = score(**params, rollout=rollout)
    assert plain.end_values is None
    jax.tree.map(
        np.testing.assert_array_equal,
        dataclasses.replace(scored, end_values=None),
        plain,
    )


def test_a_slow_critic_speaks_for_the_states_ahead(models, rollout):
    params, slow = models
    scored = score(**params, rollout=rollout, slow_critic=slow, with_end_values=True)
    fast = score(**params, rollout=rollout, with_end_values=True)
    by_slow = score(**params | {"critic": slow}, rollout=rollout, with_end_values=True)
    np.testing.assert_array_equal(scored.values, fast.values)
    np.testing.assert_array_equal(scored.target_values, by_slow.values)
    np.testing.assert_array_equal(scored.end_values, by_slow.end_values)
    assert np.abs(scored.target_values - scored.values).max() > 0.1
    assert np.abs(scored.end_values - fast.end_values).max() > 0.1
    assert fast.target_values is None


def test_there_may_be_no_reference(models, rollout):
    params, _ = models
    alone = score(**params | {"reference": None}, rollout=rollout)
    assert alone.ref_logprobs is None
    with_one = score(**params, rollout=rollout)
    np.testing.assert_array_equal(alone.logprobs, with_one.logprobs)


def test_no_gradient_flows_through_either_critic(models, rollout):
    params, slow = models

    def total(critic, slow):
        given = params | {"critic": critic, "slow_critic": slow}
        scored = score(**given, rollout=rollout, with_end_values=True)
        return jnp.sum(scored.target_values) + jnp.sum(scored.end_values)

    for grad in jax.grad(total, argnums=(0, 1))(params["critic"], slow):
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), grad)


# ---- answers of fixed length ----


@pytest.fixture(scope="module")
def uncut(rollout):
    """The same texts, as drawn by a sampler that knows no stop token."""
    return dataclasses.replace(
        rollout, lengths=jnp.full(3, T), truncated=jnp.ones(3, bool)
    )


def test_marking_stops_by_hand(uncut):
    marked, read = mark_stops(uncut, (2, 8))
    np.testing.assert_array_equal(marked.truncated, [True, False, False])
    np.testing.assert_array_equal(
        read, np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
    )
    # All tokens stay part of the answer.
    kept = dataclasses.replace(marked, truncated=uncut.truncated)
    jax.tree.map(np.testing.assert_array_equal, kept, uncut)
    np.testing.assert_array_equal(marked.mask, np.ones((3, T), bool))


def test_a_stop_in_the_last_column_is_one(uncut):
    marked, read = mark_stops(uncut, [4])
    np.testing.assert_array_equal(marked.truncated, [False, True, True])
    assert np.all(read)


def test_without_stop_ids_nothing_stops(uncut):
    marked, read = mark_stops(uncut, ())
    assert np.all(marked.truncated) and np.all(read)


def test_the_reward_model_reads_through_the_stop_and_the_others_go_on(
    models, uncut, rollout
):
    params, _ = models
    marked, _ = mark_stops(uncut, (2,))
    program = reward_model_program(READER, stop_ids=(2,), cut=False)
    scores, lengths = program(None, marked)
    cut, cut_lengths = reward_model_program(READER, stop_ids=(2,), cut=True)(
        None, rollout
    )
    np.testing.assert_allclose(scores, cut, **TOLERANCE)
    np.testing.assert_array_equal(lengths, [4, 4, 2])
    np.testing.assert_array_equal(cut_lengths, [4, 4, 2])
    # (5 + 8 + 6 + 2) / 4 without the two 7s
    np.testing.assert_allclose(scores[2], 5.25, rtol=1e-6)
    whole, _ = reward_model_program(READER, stop_ids=(2,), cut=True)(None, uncut)
    np.testing.assert_allclose(whole[2], 35 / 6, rtol=1e-6)
    assert scores.dtype == jnp.float32
    for name in ("logprobs", "ref_logprobs", "values"):
        by_mark, by_none = (
            getattr(score(**params, rollout=x), name) for x in (marked, uncut)
        )
        np.testing.assert_array_equal(by_mark, by_none)


def test_without_a_reward_model_scores_are_zero(uncut):
    without = SimpleNamespace(score_fn=None)
    scores, lengths = reward_model_program(without, stop_ids=(2,), cut=False)(
        None, uncut
    )
    np.testing.assert_array_equal(scores, np.zeros(3))
    np.testing.assert_array_equal(lengths, [4, 4, 2])
