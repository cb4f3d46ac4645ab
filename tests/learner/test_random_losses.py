"""A policy loss that draws at random: its key comes with every microbatch."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algo.covariance_losses import clip_cov_loss
from rlhf_jax.algo.options import PolicyLossOptions
from rlhf_jax.algo.policy_losses import sapo_loss
from rlhf_jax.learner import (
    ActorCritic,
    critic_free_objective,
    init_train_state,
    make_update,
    ppo_objective,
    separate_networks,
)

from .conftest import NETWORKS, TEMPERATURE

# Every other token with an advantage is a candidate, and half of them are left out.
CLIP_COV = partial(clip_cov_loss, fraction=0.5, cov_range=(-1e9, 1e9))
OPTIMIZERS = ActorCritic(actor=optax.sgd(0.1), critic=optax.sgd(0.1))
FORWARD = separate_networks(
    token_logprobs_fn=NETWORKS["token_logprobs_fn"], values_fn=NETWORKS["values_fn"]
)


def learned(params, experience, seed, **options):
    objective = ppo_objective(
        FORWARD,
        temperature=TEMPERATURE,
        policy_loss_fn=CLIP_COV,
        policy_loss_key=True,
    )
    update = make_update(
        objective, OPTIMIZERS, num_epochs=1, num_minibatches=1, **options
    )
    params = jax.tree.map(lambda x: x.copy(), params)
    state = init_train_state(jax.random.key(seed), params, OPTIMIZERS, kl_coef=0.0)
    state, metrics = update(state, experience)
    assert state.step == 1
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params.actor)])


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_the_key_of_the_run_decides(params, experience, num_microbatches):
    once, again, other = (
        learned(params, experience, seed, num_microbatches=num_microbatches)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert np.abs(other - once).max() > 1e-4


def test_each_microbatch_draws_for_itself(params, experience):
    """Two equal halves: with one draw for both, each would give half of the gradient."""
    half = jax.tree.map(lambda x: x[:8], experience)
    # Interleaved, so that microbatch 0 and microbatch 1 hold the same rows.
    twice = jax.tree.map(lambda x: x.repeat(2, axis=0), half)
    update = partial(learned, params, seed=3)
    alone = update(experience=half, num_microbatches=1)
    both = update(experience=twice, num_microbatches=2)
    assert np.abs(both - alone).max() > 1e-5


def test_what_it_would_ignore_is_refused():
    with pytest.raises(ValueError, match=r"policy_loss\.dual-clip=3\.0: is not read"):
        ppo_objective(
            FORWARD,
            policy_loss=PolicyLossOptions(dual_clip=3.0),
            policy_loss_fn=sapo_loss,
        )
    with pytest.raises(ValueError, match=r"policy_loss\.clip-eps=0\.1: is not read"):
        critic_free_objective(
            NETWORKS["token_logprobs_fn"],
            policy_loss=PolicyLossOptions(clip_eps=0.1),
            policy_loss_fn=sapo_loss,
        )
    with pytest.raises(ValueError, match="policy_loss_key=True: needs policy_loss_fn"):
        ppo_objective(FORWARD, policy_loss_key=True)
    weighted = dataclasses.replace(PolicyLossOptions(), entropy_coef=0.1)
    ppo_objective(FORWARD, policy_loss=weighted, policy_loss_fn=sapo_loss)
