"""Ratios beyond float32, at log ρ of 100 and more: gradients promised to be 0."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.covariance_losses import clip_cov_loss, kl_cov_loss
from rlhf_jax.algo.losses import actor_loss
from rlhf_jax.algo.policy_losses import (
    cispo_loss,
    clipped_policy_loss,
    gmpo_loss,
    gspo_loss,
    sapo_loss,
)
from rlhf_jax.algo.types import Experience


def term_and_slope(loss_fn, log_ratio, advantage):
    """Loss and gradient of one token beside another whose ratio is 1."""

    def total(first):
        logprobs = jnp.stack([first, jnp.float32(-1.0)])[None]
        old = jnp.array([[-120.0, -1.0]])
        advantages = jnp.array([[advantage, 1.0]], jnp.float32)
        terms = loss_fn(logprobs, old, advantages, jnp.ones((1, 2), bool))
        return terms[0, 0], terms

    value, slope = jax.value_and_grad(total, has_aux=True)(
        jnp.float32(-120.0 + log_ratio)
    )
    assert np.isfinite(value[1][0, 1])
    return float(value[0]), float(slope)


CLIPPED = {
    "ppo": (clipped_policy_loss, -1.2),
    "ppo, dual clip": (partial(clipped_policy_loss, dual_clip=3.0), -1.2),
    "ppo, clamped": (partial(clipped_policy_loss, log_ratio_clamp=20.0), -1.2),
    "gspo": (partial(gspo_loss, clip_eps=0.1, clip_eps_high=0.3), -1.3),
    "sapo": (sapo_loss, -4.0),  # its gate is open for good: −4/τ
    "clip-cov": (partial(clip_cov_loss, key=jax.random.key(0)), -1.2),
}


@pytest.mark.parametrize("log_ratio", [100.0, 119.0])
@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_token_has_a_gradient_of_zero_at_any_ratio(name, log_ratio):
    loss_fn, bound = CLIPPED[name]
    if name == "gspo":  # its ratio is that of the whole answer: two tokens
        log_ratio *= 2
    loss, slope = term_and_slope(loss_fn, log_ratio, 1.0)
    assert loss == pytest.approx(bound, rel=1e-6)
    assert slope == 0.0


@pytest.mark.parametrize("name", CLIPPED)
def test_a_token_without_an_advantage_neither(name):
    loss, slope = term_and_slope(CLIPPED[name][0], 119.0, 0.0)
    assert loss == 0.0 and slope == 0.0


def test_nor_under_losses_that_clip_no_ratio():
    loss, slope = term_and_slope(kl_cov_loss, 119.0, 0.0)
    assert np.isfinite([loss, slope]).all()

    def total(logprobs):  # GMPO's ratio is that of the whole response
        zeros = jnp.zeros((1, 2))
        return jnp.sum(gmpo_loss(logprobs, zeros, zeros, jnp.ones((1, 2), bool)))

    loss, slopes = jax.value_and_grad(total)(jnp.full((1, 2), 119.0))
    assert loss == 0.0
    np.testing.assert_array_equal(slopes, np.zeros((1, 2)))


def test_the_weight_of_a_kl_is_bounded_with_the_ratio():
    """One token at log ρ = 118, as verl bounds it: a finite loss and gradient."""

    def loss(logprob):
        experience = Experience(
            mask=jnp.ones((1, 1), bool),
            old_logprobs=jnp.full((1, 1), -119.0),
            advantages=jnp.full((1, 1), -2.0),
            ref_logprobs=jnp.full((1, 1), -1.5),
            kl_coef=jnp.full(1, 0.1),
        )
        return actor_loss(
            logprob[None, None],
            experience,
            dual_clip=3.0,
            log_ratio_clamp=20.0,
            importance_weighted_kl=True,
        )[0]

    value, slope = jax.value_and_grad(loss)(jnp.float32(-1.0))
    # 6 of the policy, and e²⁰ · 0.1 · ½ · 0.5² of the KL.
    assert value == pytest.approx(6.0 + np.exp(20) * 0.0125, rel=1e-5)
    assert slope == pytest.approx(np.exp(20) * 0.05, rel=1e-5)


def test_a_dual_clip_bounds_what_would_overflow():
    dual = partial(clipped_policy_loss, dual_clip=3.0)
    assert term_and_slope(dual, 119.0, -2.0) == (6.0, 0.0)
    clamped = partial(clipped_policy_loss, dual_clip=3.0, log_ratio_clamp=20.0)
    assert term_and_slope(clamped, 119.0, -2.0) == (6.0, 0.0)


def test_without_a_bound_the_loss_says_so():
    loss, _ = term_and_slope(clipped_policy_loss, 119.0, -2.0)
    assert loss == np.inf  # it is what PPO's formula says, and no step is taken


def test_a_bounded_weight_keeps_learning():
    loss, slope = term_and_slope(cispo_loss, 118.0, -2.0)
    assert loss == pytest.approx(-20.0)  # −5·A·log π with A = log π = −2
    assert slope == pytest.approx(10.0)
