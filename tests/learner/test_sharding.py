"""Scoring and updating on eight devices is scoring and updating on one."""

import dataclasses
import logging
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.learner import (
    ActorCritic,
    init_train_state,
    make_optimizer,
    make_update,
    ppo_objective,
    separate_networks,
)
from rlhf_jax.models.callables import critic, policy, reward_model
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama
from rlhf_jax.rollout import make_experience, score_rollout
from rlhf_jax.run.devices import make_mesh, put_batch

MESHES = {"4x2": {"data": 4, "fsdp": 2}, "8x1": {"data": 8}}
V = 10
optimizers = ActorCritic(actor=make_optimizer(1e-3), critic=make_optimizer(1e-3))


def one_layer(module, params):
    """Compiles in half the time."""
    config = dataclasses.replace(module.config, num_layers=1)
    layers = jax.tree.map(lambda x: x[:1], params["layers"])
    return module.clone(config=config), params | {"layers": layers}


@pytest.fixture(scope="module")
def networks():
    """An actor of the GPT-2 family; critic and reward model of the Llama family."""
    options = {"vocab_size": V, "max_positions": 8}
    return {
        "actor": one_layer(*tiny_gpt2(**options, seed=0)),
        "reference": one_layer(*tiny_gpt2(**options, seed=1)),
        "critic": one_layer(*tiny_llama("value", **options, seed=2)),
        "reward": one_layer(*tiny_llama("reward", **options, seed=3)),
    }


@pytest.fixture(scope="module")
def callables(networks):
    return {
        "token_logprobs_fn": policy(networks["actor"][0]).token_logprobs,
        "values_fn": critic(networks["critic"][0]),
    }


@pytest.fixture(scope="module")
def experience_of(networks, callables):
    """`(params of the four, rollout) -> (Experience, metrics)`."""
    score_fn = reward_model(networks["reward"][0])

    def experience_of(params, rollout):
        scored = score_rollout(
            params["actor"],
            params["critic"],
            params["reference"],
            score_fn(params["reward"], rollout.tokens, rollout.sequence_mask),
            rollout,
            **callables,
        )
        return make_experience(scored, kl_coef=0.05)

    return jax.jit(experience_of)


@pytest.fixture(scope="module")
def frozen(networks):
    return {name: params for name, (_, params) in networks.items()}


@pytest.fixture(scope="module")
def single(frozen, rollout, experience_of, callables):
    """Experience, its metrics, state and metrics of one update, on one device.

    The last two rows of the rollout hold no answer: a shard without a token.
    """
    experience, metrics = experience_of(frozen, rollout)
    update = make_update(
        ppo_objective(separate_networks(**callables)),
        optimizers,
        num_epochs=2,
        num_minibatches=2,
    )
    state, updated = update(start_of(frozen), experience)
    return experience, metrics, state, updated


def start_of(frozen):
    params = ActorCritic(actor=frozen["actor"], critic=frozen["critic"])
    return init_train_state(
        jax.random.key(0), jax.tree.map(jnp.copy, params), optimizers, kl_coef=0.05
    )


def assert_close(got, want, **tolerance):
    def compare(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, **tolerance)

    jax.tree.map(compare, got, want)


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_are_one(
    shape, frozen, rollout, experience_of, callables, single, caplog
):
    experience, metrics, after, updated = single
    mesh = make_mesh(**MESHES[shape])
    placed = jax.device_put(frozen, parameter_sharding(mesh, frozen))
    spread = put_batch(mesh, rollout)

    got, got_metrics = experience_of(placed, spread)
    assert len(got.advantages.sharding.device_set) == 8
    assert [s.data.shape[0] for s in got.advantages.addressable_shards] == [2] * 8
    # Whole networks, and sums over all tokens in another order.
    assert_close(got, experience, rtol=1e-4, atol=2e-5)
    assert_close(got_metrics, metrics, rtol=1e-4, atol=2e-5)

    start = start_of(frozen)
    sharding = parameter_sharding(mesh, start)
    objective = chex.assert_max_traces(
        ppo_objective(separate_networks(**callables)), n=1
    )
    update = make_update(
        objective,
        optimizers,
        num_epochs=2,
        num_minibatches=2,
        state_sharding=sharding,
    )
    state = jax.device_put(start, sharding)
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        state, got_updated = update(state, got)
        first = jax.tree.map(jnp.copy, state)
        for _ in range(2):
            state, _ = update(state, got)
    messages = [record.getMessage() for record in caplog.records]
    assert len([m for m in messages if re.match(r"Compiling \S*update\b", m)]) == 1

    assert_close(got_updated, updated, rtol=1e-4, atol=2e-5)
    assert_close(first, after, rtol=1e-4, atol=2e-5)
    for placed_state in (first, state):
        assert jax.tree.map(lambda x: x.sharding, placed_state) == sharding
    if "fsdp" in MESHES[shape]:
        kernel = state.params.actor["layers"]["up"]["kernel"]
        moment = optax.tree.get(state.opt_state.critic, "mu")["layers"]["up"]["kernel"]
        for leaf in (kernel, moment):
            shards = {s.data.shape for s in leaf.addressable_shards}
            assert shards == {(1, 32, leaf.shape[2] // 2)}
