"""Which loss the options name, and functions in its place: by a table of log π."""

import dataclasses
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.covariance_losses import clip_cov_loss
from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import actor_loss
from rlhf_jax.algo.options import KLOptions, PolicyLossOptions
from rlhf_jax.algo.policy_losses import (
    cispo_loss,
    clipped_policy_loss,
    gmpo_loss,
    gspo_loss,
    reinforce_loss,
    sapo_loss,
)
from rlhf_jax.algo.types import Experience
from rlhf_jax.learner import (
    ActorCritic,
    count_experience,
    critic_free_objective,
    ppo_objective,
)

B, T = 16, 5
LOSS_KL = KLOptions(place="loss", estimator="k2")
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def grouped():
    """One advantage per answer, and a policy that has moved since."""
    rng = np.random.default_rng(1)
    mask = np.arange(T) < rng.integers(1, T + 1, (B, 1))
    old, ref = rng.normal(-2, 0.5, (2, B, T)).astype(np.float32)
    advantages = np.where(mask, rng.normal(0, 1, (B, 1)), 0)
    return Experience(
        mask=jnp.asarray(mask),
        old_logprobs=jnp.asarray(old),
        advantages=jnp.asarray(advantages, jnp.float32),
        ref_logprobs=jnp.asarray(ref),
        kl_coef=jnp.full(B, 0.05),
        tokens=jnp.zeros((B, 1), jnp.int32),
        sequence_mask=jnp.ones((B, 1), bool),
    )


CLIP = {"clip_eps": 0.05, "clip_eps_high": 0.3}
SURROGATES = {
    "ppo": (CLIP, partial(clipped_policy_loss, **CLIP)),
    "gspo": (CLIP, partial(gspo_loss, **CLIP)),
    "gmpo": (CLIP, partial(gmpo_loss, **CLIP)),
    "cispo": ({"ratio_bound": 1.2}, partial(cispo_loss, bound=1.2)),
    "sapo": ({}, sapo_loss),
    "reinforce": ({}, reinforce_loss),
}


def tabular(params, tokens, mask, /, *, response_length, temperature):
    """The parameters are the log-probabilities."""
    return params, jnp.ones_like(params)


def by_table(experience, kl=LOSS_KL, **options):
    """The log-probabilities, the metrics and the gradient in them."""
    objective = critic_free_objective(tabular, kl=kl, **options)
    table = np.random.default_rng(2).normal(-2, 0.5, (B, T)).astype(np.float32)
    params = ActorCritic(actor=jnp.asarray(table), critic={})
    fn = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, metrics), grads = fn(params, experience, count_experience(experience))
    return params.actor, metrics, grads.actor


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_surrogate_is_the_function_of_that_name(grouped, surrogate):
    changes, function = SURROGATES[surrogate]
    options = PolicyLossOptions(surrogate=surrogate, **changes)
    table, metrics, grads = by_table(grouped, policy_loss=options)

    def directly(logprobs):
        return actor_loss(
            logprobs,
            grouped,
            policy_loss_fn=function,
            kl_fn=partial(kl_estimate, estimator="k2"),
        )

    want, direct_metrics = jax.grad(directly, has_aux=True)(table)
    close(grads, want)
    close(metrics["policy/loss"], direct_metrics["policy_loss"])
    mask = np.asarray(grouped.mask)
    terms = function(table, grouped.old_logprobs, grouped.advantages, grouped.mask)
    close(metrics["policy/loss"], np.asarray(terms)[mask].mean())


def test_the_surrogates_differ(grouped):
    mask = np.asarray(grouped.mask)
    found = []
    for surrogate, (changes, _) in SURROGATES.items():
        options = PolicyLossOptions(surrogate=surrogate, **changes)
        _, _, grads = by_table(grouped, policy_loss=options)
        assert all(np.abs((grads - x)[mask]).max() > 1e-4 for x in found), surrogate
        found.append(grads)


def test_every_surrogate_has_a_case():
    names = get_args(get_type_hints(PolicyLossOptions)["surrogate"])
    assert SURROGATES.keys() == set(names)


DEFAULTS = {
    "ppo": partial(clipped_policy_loss, clip_eps=0.2),
    "gspo": partial(gspo_loss, clip_eps=3e-4, clip_eps_high=4e-4),
    "gmpo": partial(gmpo_loss, clip_eps=0.4),
    "cispo": partial(cispo_loss, bound=5.0),
}


@pytest.mark.parametrize("surrogate", DEFAULTS)
def test_each_surrogate_has_bounds_of_its_own(grouped, surrogate):
    _, metrics, grads = by_table(
        grouped, policy_loss=PolicyLossOptions(surrogate=surrogate)
    )
    _, want, want_grads = by_table(grouped, policy_loss_fn=DEFAULTS[surrogate])
    close(metrics["policy/loss"], want["policy/loss"])
    close(grads, want_grads)


def test_one_bound_is_that_of_both_sides(grouped):
    one = PolicyLossOptions(surrogate="gspo", clip_eps=0.1)
    two = dataclasses.replace(one, clip_eps_high=0.1)
    jax.tree.map(
        np.testing.assert_array_equal,
        by_table(grouped, policy_loss=one),
        by_table(grouped, policy_loss=two),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "reinforce"},
        {"surrogate": "cispo", "ratio_bound": 3.0},
        {"clip_eps": 0.2},
        {"clip_eps": 0.2, "clip_eps_high": 0.3},
        {"dual_clip": 3.0},
        {"log_ratio_clamp": 20.0},
    ],
)
@pytest.mark.parametrize("objective", [critic_free_objective, ppo_objective])
def test_options_of_surrogates_beside_a_function_are_refused(objective, options):
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(ValueError, match=f"^policy_loss.{name}=.* with policy_loss_"):
        objective(
            tabular, policy_loss=PolicyLossOptions(**options), policy_loss_fn=sapo_loss
        )


def test_a_key_for_a_loss_that_draws(grouped):
    # The same draw as by hand; without a function there is nothing to give a key to.
    table = jnp.asarray(np.random.default_rng(2).normal(-2, 0.5, (B, T)), jnp.float32)
    loss_fn = partial(clip_cov_loss, fraction=0.3, cov_range=(-10.0, 10.0))
    objective = critic_free_objective(
        tabular, kl=LOSS_KL, policy_loss_fn=loss_fn, policy_loss_key=True
    )
    params = ActorCritic(actor=table, critic={})
    found = []
    for seed in (0, 1):
        key = jax.random.key(seed)
        _, metrics = objective(params, grouped, count_experience(grouped), key)
        arrays = (grouped.old_logprobs, grouped.advantages, grouped.mask)
        terms = np.asarray(loss_fn(table, *arrays, key=key))
        close(metrics["policy/loss"], terms[np.asarray(grouped.mask)].mean())
        found.append(float(metrics["policy/loss"]))
    assert found[0] != found[1]
    with pytest.raises(ValueError, match=r"^policy_loss_key=True: needs policy_"):
        critic_free_objective(tabular, policy_loss_key=True)


def test_without_sequences_there_is_nothing_to_read(grouped):
    bare = dataclasses.replace(grouped, tokens=None)
    with pytest.raises(ValueError, match="has no tokens and sequence_mask"):
        by_table(bare)


def test_a_function_takes_the_place_of_the_surrogate(grouped):
    _, metrics, grads = by_table(grouped, policy_loss_fn=sapo_loss)
    _, want, want_grads = by_table(
        grouped, policy_loss=PolicyLossOptions(surrogate="sapo")
    )
    close(metrics["policy/loss"], want["policy/loss"])
    close(grads, want_grads)
