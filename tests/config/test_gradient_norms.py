"""Presets whose loss is a sum over tokens: the norm of the gradient before its clip.

A gradient that grows with the length of responses is cut to `max_grad_norm` at every
step: the learning rate then is all that is left of its size, and the longer the
responses, the more so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bare_models import context_logits, context_params

from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.learner.objectives import count_experience, critic_free_objective
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.rollout import (
    make_group_experience,
    score_rollout,
    token_logprobs_from_logits,
)

B, V = 64, 16
LENGTHS = (16, 48, 128)
LOGPROBS = token_logprobs_from_logits(context_logits)


@functools.cache
def norm(name, limit, aggregation=None):
    """Of one batch of scores with deviation 1, in responses near their limit."""
    method = GRPO_PRESETS[name]()
    rng = np.random.default_rng(limit)
    rows = B // method.group_size * method.group_size
    lengths = jnp.asarray(rng.integers(limit * 3 // 4, limit + 1, rows), jnp.int32)
    rollout = Rollout(
        prompts=Prompts(
            tokens=jnp.ones((rows, 2), jnp.int32),
            lengths=jnp.full(rows, 2, jnp.int32),
        ),
        responses=jnp.asarray(rng.integers(0, V, (rows, limit)), jnp.int32),
        lengths=lengths,
        truncated=lengths == limit,
        logprobs=jnp.zeros((rows, limit)),
    )
    scores = jnp.asarray(rng.normal(size=rows), jnp.float32)
    actor, _ = context_params(jax.random.key(0), vocab_size=V, width=8)
    scored = score_rollout(
        actor, None, actor, scores, rollout, token_logprobs_fn=LOGPROBS, values_fn=None
    )
    greedy = None
    if method.groups.baseline == "greedy":
        greedy = rollout, jnp.zeros(rows)
    options = method.policy_loss
    if aggregation is not None:
        options = type(options)(**vars(options) | {"aggregation": aggregation})
    experience, _ = make_group_experience(
        scored,
        group_size=method.group_size,
        kl_coef=method.kl.coef,
        kl=method.kl,
        groups=method.groups,
        policy_loss=options,
        greedy=greedy,
    )
    objective = critic_free_objective(LOGPROBS, policy_loss=options, kl=method.kl)
    params = ActorCritic(actor=actor, critic={})
    grads, _ = jax.grad(objective, has_aux=True)(
        params, experience, count_experience(experience)
    )
    return float(optax.tree.norm(grads.actor))


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "remax"])
def test_it_does_not_grow_with_the_length_of_responses(name):
    bound = GRPO_PRESETS[name]().optimizer.max_grad_norm
    norms = [norm(name, limit) for limit in LENGTHS]
    assert max(norms) < bound, norms
    assert max(norms[1:]) <= norms[0] * 1.2, norms
    # Without the constant divisor it does, and is far beyond the bound.
    sums = [norm(name, limit, "seq-mean-token-sum") for limit in LENGTHS]
    assert sums[0] < sums[1] < sums[2] and sums[0] > bound, sums
    np.testing.assert_allclose(
        norms, np.divide(sums, LENGTHS), rtol=1e-4
    )  # the same direction
