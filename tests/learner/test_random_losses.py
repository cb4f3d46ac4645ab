"""A policy loss that draws at random: its key comes with every microbatch."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from bare_models import context_logits, context_values

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
from rlhf_jax.rollout import token_logprobs_from_logits, values_from_sequence

# Every other token with an advantage is a candidate, and half of them are left out.
CLIP_COV = partial(clip_cov_loss, fraction=0.5, cov_range=(-1e9, 1e9))
OPTIMIZERS = ActorCritic(actor=optax.sgd(0.1), critic=optax.sgd(0.1))
TOKEN_LOGPROBS_FN = token_logprobs_from_logits(context_logits)
FORWARD = separate_networks(
    token_logprobs_fn=TOKEN_LOGPROBS_FN, values_fn=values_from_sequence(context_values)
)


def learned(params, experience, seed, *, objective_key=True, **options):
    objective = ppo_objective(
        FORWARD,
        policy_loss_fn=CLIP_COV,
        policy_loss_key=True,
    )
    update = make_update(
        objective,
        OPTIMIZERS,
        num_epochs=1,
        num_minibatches=1,
        objective_key=objective_key,
        **options,
    )
    params = jax.tree.map(lambda x: x.copy(), params)
    state = init_train_state(jax.random.key(seed), params, OPTIMIZERS, kl_coef=0.0)
    state, _ = update(state, experience)
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


def test_without_keys_from_the_update_it_is_refused(params, experience):
    with pytest.raises(ValueError, match=r"policy_loss_key=True: .*objective_key=True"):
        learned(params, experience, 0, objective_key=False)


def test_what_it_would_ignore_is_refused():
    with pytest.raises(ValueError, match=r"policy_loss\.dual-clip=3\.0: has no effect"):
        ppo_objective(
            FORWARD,
            policy_loss=PolicyLossOptions(dual_clip=3.0),
            policy_loss_fn=sapo_loss,
        )
    with pytest.raises(ValueError, match=r"policy_loss\.clip-eps=0\.1: has no effect"):
        critic_free_objective(
            TOKEN_LOGPROBS_FN,
            policy_loss=PolicyLossOptions(clip_eps=0.1),
            policy_loss_fn=sapo_loss,
        )
    with pytest.raises(ValueError, match="policy_loss_key=True: needs policy_loss_fn"):
        ppo_objective(FORWARD, policy_loss_key=True)
    weighted = dataclasses.replace(PolicyLossOptions(), entropy_coef=0.1)
    ppo_objective(FORWARD, policy_loss=weighted, policy_loss_fn=sapo_loss)
