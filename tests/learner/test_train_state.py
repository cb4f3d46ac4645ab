"""`train_state.py`: what a state holds is all that training needs to go on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import (
    context_logits,
    context_params,
    context_values,
    left_padded,
)

from rlhf_jax.algo.types import Prompts
from rlhf_jax.learner import (
    ActorCritic,
    init_model_state,
    init_train_state,
    make_optimizer,
    make_schedule,
    make_update,
    ppo_objective,
    separate_networks,
    step_keys,
)
from rlhf_jax.rollout import (
    generate,
    make_experience,
    score_rollout,
    token_logprobs_from_logits,
    uncached_decoding,
    values_from_sequence,
)
from rlhf_jax.run.checkpointer import Checkpointer

V = 10


@pytest.fixture(scope="module")
def optimizers():
    # A rate that depends on the step, so that a lost counter shows.
    schedule = make_schedule(
        "linear", learning_rate=0.02, total_steps=40, warmup_steps=10
    )
    return ActorCritic(
        actor=make_optimizer(schedule), critic=make_optimizer(0.01, weight_decay=0.1)
    )


def start_of(optimizers):
    actor, critic = context_params(jax.random.key(0), vocab_size=V, width=6)
    return init_train_state(
        jax.random.key(5),
        ActorCritic(actor=actor, critic=critic),
        optimizers,
        kl_coef=0.05,
    )


@pytest.fixture(scope="module")
def train(optimizers):
    """`(state, updates) -> (state, texts)`: rollout, experience, update, again."""
    networks = {
        "token_logprobs_fn": token_logprobs_from_logits(context_logits),
        "values_fn": values_from_sequence(context_values),
    }
    prefill, decode = uncached_decoding(context_logits)
    reference, _ = context_params(jax.random.key(0), vocab_size=V, width=6)
    tokens, lengths = left_padded([[x] * (1 + x % 3) for x in range(8)], width=3)
    prompts = Prompts(tokens=tokens, lengths=lengths)

    @jax.jit
    def experience_of(state):
        rollout = generate(
            step_keys(state)[0],
            state.params.actor,
            prompts,
            prefill=prefill,
            decode=decode,
            max_new_tokens=4,
            stop_ids=(3,),
        )
        scored = score_rollout(
            None,
            state.params.critic,
            reference,
            jnp.mean(rollout.tokens == 4, axis=1),
            rollout,
            **networks,
        )
        experience, _ = make_experience(scored, kl_coef=state.kl_coef)
        return experience, rollout.responses

    update = make_update(
        ppo_objective(separate_networks(**networks)),
        optimizers,
        num_epochs=2,
        num_minibatches=2,
    )

    def train(state, updates):
        texts = []
        for _ in range(updates):
            experience, responses = experience_of(state)
            texts.append(np.array(responses))
            state, _ = update(state, experience)
        return state, texts

    return train


def test_stopping_and_resuming_changes_no_bit(train, optimizers, tmp_path):
    want, want_texts = train(start_of(optimizers), 4)

    state, texts = train(start_of(optimizers), 2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
    with Checkpointer(tmp_path) as checkpointer:
        state, _ = checkpointer.restore(2, start_of(optimizers))
    got, later_texts = train(state, 2)

    np.testing.assert_array_equal(texts + later_texts, want_texts)
    assert not np.array_equal(texts[0], texts[1])  # another step, another noise
    got_leaves, want_leaves = (
        jax.tree.leaves_with_path(jax.tree.map(host, state)) for state in (got, want)
    )
    for (path, ours), (_, theirs) in zip(got_leaves, want_leaves, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))
    assert got.step == 4


def host(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def test_every_step_has_two_keys_of_its_own(optimizers):
    state = start_of(optimizers)
    keys = []
    for step in range(3):
        keys += step_keys(dataclasses.replace(state, step=jnp.int32(step)))
    data = {host(key).tobytes() for key in [*keys, state.key]}
    assert len(data) == 7
    again = step_keys(state)
    np.testing.assert_array_equal(host(again[0]), host(keys[0]))
    np.testing.assert_array_equal(host(again[1]), host(keys[1]))


def test_a_state_before_the_first_step(optimizers):
    state = start_of(optimizers)
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert state.kl_coef == jnp.float32(0.05) and state.kl_coef.shape == ()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    single = init_model_state(jax.random.key(5), state.params.actor, optimizers.actor)
    assert single.step == 0 and single.step.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, single.opt_state, state.opt_state.actor)
