"""One small actor and critic, and experience with answers of unequal lengths."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import context_logits, context_params, context_values

from rlhf_jax.algo.options import PolicyLossOptions
from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.learner import ActorCritic, ppo_objective, separate_networks
from rlhf_jax.rollout import (
    make_experience,
    score_rollout,
    token_logprobs_from_logits,
    values_from_sequence,
)

B, P, T, V = 16, 3, 5, 10
TEMPERATURE = 0.7
NETWORKS = {
    "token_logprobs_fn": token_logprobs_from_logits(context_logits),
    "values_fn": values_from_sequence(context_values),
    "temperature": TEMPERATURE,
}


@pytest.fixture(autouse=True)
def count_traces_anew():
    chex.clear_trace_counter()  # it tells functions apart by their source alone


@pytest.fixture(scope="session")
def rollout():
    """Prompts of 1 to 3 tokens, answers of 1 to 5, and none at all in the last rows."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, B)
    lengths[-2:] = 0
    return Rollout(
        prompts=Prompts(
            tokens=jnp.asarray(rng.integers(0, V, (B, P)), jnp.int32),
            lengths=jnp.asarray(rng.integers(1, P + 1, B), jnp.int32),
        ),
        responses=jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        truncated=jnp.asarray(lengths == T),
        logprobs=jnp.zeros((B, T)),
    )


@pytest.fixture
def params():
    """Fresh arrays each time: an update donates them."""
    actor, critic = context_params(jax.random.key(0), vocab_size=V, width=6)
    return ActorCritic(actor=actor, critic=critic)


@pytest.fixture(scope="session")
def objective():
    return ppo_objective(
        separate_networks(
            token_logprobs_fn=NETWORKS["token_logprobs_fn"],
            values_fn=NETWORKS["values_fn"],
        ),
        temperature=TEMPERATURE,
        policy_loss=PolicyLossOptions(entropy_coef=0.01),
    )


@pytest.fixture(scope="session")
def on_policy(rollout):
    """Experience that the actor and the critic of `params` would have made."""
    actor, critic = context_params(jax.random.key(0), vocab_size=V, width=6)
    reference, _ = context_params(jax.random.key(1), vocab_size=V, width=6)

    @jax.jit
    def experience_of(rollout):
        scored = score_rollout(
            actor,
            critic,
            reference,
            jnp.sum(jnp.where(rollout.sequence_mask, rollout.tokens, 0), 1) / V,
            rollout,
            **NETWORKS,
        )
        return make_experience(scored, kl_coef=0.05)[0]

    return experience_of(rollout)


@pytest.fixture(scope="session")
def experience(on_policy):
    """The same, as if the actor and the critic had moved since."""
    rng = np.random.default_rng(1)
    noise = partial(rng.normal, 0, 0.2, (B, T))
    return dataclasses.replace(
        on_policy,
        old_logprobs=on_policy.old_logprobs + jnp.asarray(noise(), jnp.float32),
        old_values=on_policy.old_values + jnp.asarray(noise(), jnp.float32),
    )
