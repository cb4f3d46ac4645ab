"""Policy and value losses: where gradients are 0, where they go, and how terms add."""

import dataclasses
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.pure_functions import experience_of
from properties.strategies import (
    CHECK,
    TOLERANCE,
    B,
    T,
    any_masks,
    arrays,
    batches,
    ragged_masks,
)

from rlhf_jax.algo import losses, policy_losses
from rlhf_jax.algo.covariance_losses import clip_cov_loss
from rlhf_jax.algo.masking import Aggregation, aggregate

EPS = st.sampled_from([0.1, 0.2, 0.4])
MODES = get_args(Aggregation)


@jax.jit
def policy_terms(x, low, high, dual_clip=None, clamp=None):
    """Loss of every token, and its gradient in log π."""

    def total(logprobs):
        terms = policy_losses.clipped_policy_loss(
            logprobs,
            x["old_logprobs"],
            x["advantages"],
            jnp.ones((B, T), bool),
            clip_eps=low,
            clip_eps_high=high,
            dual_clip=dual_clip,
            log_ratio_clamp=clamp,
        )
        return jnp.sum(terms), terms

    gradient, terms = jax.grad(total, has_aux=True)(x["logprobs"])
    return terms, gradient


@partial(jax.jit, static_argnames=("half", "clip"))
def value_terms(x, eps, half=True, *, clip=True):
    def total(values):
        terms = losses.clipped_value_loss(
            values,
            x["old_values"],
            x["returns"],
            clip_eps=eps if clip else None,
            half=half,
        )
        return jnp.sum(terms), terms

    gradient, terms = jax.grad(total, has_aux=True)(x["values"])
    return terms, gradient


def exact(batch):
    """Ratios and advantages in float64."""
    log_ratio = batch["logprobs"].astype(np.float64) - batch["old_logprobs"]
    return np.exp(log_ratio), batch["advantages"].astype(np.float64)


# ---- the clip ----


@given(batch=batches(), low=EPS, high=EPS)
@CHECK
def test_the_gradient_is_zero_where_the_clipped_branch_is_the_larger(batch, low, high):
    terms, gradient = policy_terms(batch, low, high)
    ratio, advantages = exact(batch)
    names = ("logprobs", "old_logprobs", "advantages")
    want = oracles.ppo_terms(*(batch[n] for n in names), low, high)
    np.testing.assert_allclose(terms, want, **TOLERANCE)
    clipped = np.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    np.testing.assert_array_equal(np.asarray(gradient) == 0, clipped)
    pulled = np.where(clipped, 0, -ratio * advantages)
    np.testing.assert_allclose(gradient, pulled, **TOLERANCE)


@given(batch=batches())
@CHECK
def test_without_a_bound_it_is_importance_sampled(batch):
    ratio, advantages = exact(batch)
    for options in ({}, {"dual_clip": 1e9}, {"clamp": 20.0}):
        terms, gradient = policy_terms(batch, 1e9, 1e9, **options)
        np.testing.assert_allclose(terms, -ratio * advantages, **TOLERANCE)
        np.testing.assert_allclose(gradient, -ratio * advantages, **TOLERANCE)


@given(batch=batches(), c=st.sampled_from([1.5, 3.0, 6.0]))
@CHECK
def test_dual_clip_acts_on_bad_tokens_of_large_ratio_alone(batch, c):
    plain, plain_gradient = policy_terms(batch, 0.2, 0.2)
    terms, gradient = policy_terms(batch, 0.2, 0.2, dual_clip=c)
    ratio, advantages = exact(batch)
    acts = (advantages < 0) & (ratio > c)
    np.testing.assert_allclose(
        terms, np.where(acts, -c * advantages, plain), **TOLERANCE
    )
    np.testing.assert_array_equal(gradient, np.where(acts, 0, plain_gradient))


@given(batch=batches(), clamp=st.sampled_from([0.3, 0.7]))
@CHECK
def test_a_clamp_bounds_the_ratio_and_ends_the_gradient(batch, clamp):
    ratio, advantages = exact(batch)
    bounded = np.clip(ratio, np.exp(-clamp), np.exp(clamp))
    terms, gradient = policy_terms(batch, 1e9, 1e9, clamp=clamp)
    np.testing.assert_allclose(terms, -bounded * advantages, **TOLERANCE)
    acts = np.abs(np.log(ratio)) > clamp
    np.testing.assert_array_equal(np.asarray(gradient) == 0, acts)


@given(advantages=arrays((B, T)), far=st.floats(100, 1e6, width=32))
@CHECK
def test_a_clamp_keeps_any_ratio_finite(advantages, far):
    signs = np.where(np.arange(T) % 2, 1, -1).astype(np.float32)
    old = np.zeros((B, T), np.float32)
    batch = {"logprobs": old + far * signs, "old_logprobs": old}
    terms, gradient = policy_terms(
        batch | {"advantages": advantages}, 0.2, 0.2, clamp=20.0
    )
    assert np.isfinite(terms).all()
    np.testing.assert_array_equal(gradient, 0)


# ---- ratio one ----

POLICY_LOSSES = {
    "ppo": None,
    "dual clip": partial(
        policy_losses.clipped_policy_loss, dual_clip=3.0, log_ratio_clamp=20.0
    ),
    "reinforce": policy_losses.reinforce_loss,
    "gspo": policy_losses.gspo_loss,
    "geometric_mean": policy_losses.gmpo_loss,
    "cispo": policy_losses.cispo_loss,
    "sapo": policy_losses.sapo_loss,
    # Its range of covariances leaves nothing out here.
    "clip_cov": partial(clip_cov_loss, key=jax.random.key(0), cov_range=(1e3, 1e4)),
}


@partial(jax.jit, static_argnames="loss")
def actor_gradient(x, loss):
    experience = experience_of(x)
    fn = partial(losses.actor_loss, policy_loss_fn=POLICY_LOSSES[loss])
    return jax.grad(fn, has_aux=True)(x["logprobs"], experience)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@given(batch=batches())
@CHECK
def test_an_unchanged_policy(loss, batch):
    batch = batch | {"logprobs": batch["old_logprobs"]}
    mask = batch["mask"]
    gradient, metrics = actor_gradient(batch, loss)
    count = max(mask.sum(), 1)
    want = np.where(mask, -batch["advantages"], 0) / count
    np.testing.assert_allclose(gradient, want, **TOLERANCE)
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0
    np.testing.assert_allclose(metrics["ratio_mean"], float(mask.any()), rtol=1e-6)


# ---- values ----


@given(batch=batches(), eps=EPS)
@CHECK
def test_the_value_clip_only_adds(batch, eps):
    v, old, target = (
        batch[n].astype(np.float64) for n in ("values", "old_values", "returns")
    )
    terms, gradient = value_terms(batch, eps)
    plain, plain_gradient = value_terms(batch, eps, clip=False)
    np.testing.assert_allclose(plain, (v - target) ** 2 / 2, **TOLERANCE)
    np.testing.assert_allclose(plain_gradient, v - target, **TOLERANCE)
    want = oracles.value_terms(v, old, target, eps)
    np.testing.assert_allclose(terms, want, **TOLERANCE)
    assert np.all(np.asarray(terms) >= plain)
    # Clipped: moved by more than ε, and nearer to the target than the bound is.
    bound = old + np.clip(v - old, -eps, eps)
    clipped = np.abs(bound - target) > np.abs(v - target)
    np.testing.assert_allclose(gradient, np.where(clipped, 0, v - target), **TOLERANCE)
    unmoved, _ = value_terms(batch | {"values": batch["old_values"]}, eps)
    np.testing.assert_allclose(unmoved, (old - target) ** 2 / 2, **TOLERANCE)


@given(batch=batches(), eps=EPS)
@CHECK
def test_the_half_is_a_scale(batch, eps):
    halves, full = value_terms(batch, eps), value_terms(batch, eps, False)
    for half, whole in zip(halves, full, strict=True):  # terms and gradients
        np.testing.assert_allclose(whole, 2 * half, rtol=1e-6)


# ---- where gradients go ----


@jax.jit
def gradient_in_the_frozen(x):
    experience = experience_of(x, weights=x["weights"], kl_coef=x["kl_coef"])

    def total(frozen):
        given = dataclasses.replace(experience, **frozen)
        actor, _ = losses.actor_loss(x["logprobs"], given)
        critic, _ = losses.critic_loss(x["values"], given)
        return actor + critic

    frozen = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    names = (*frozen, "weights")
    return jax.grad(total)({name: getattr(experience, name) for name in names})


@given(batch=batches())
@CHECK
def test_no_gradient_reaches_what_is_frozen(batch):
    for name, gradient in gradient_in_the_frozen(batch).items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)


# ---- options of the two objectives ----


@jax.jit
def weighted_actor(x):
    experience = experience_of(x, weights=x["weights"], kl_coef=x["kl_coef"])

    def loss(logprobs):
        return losses.actor_loss(
            logprobs,
            experience,
            entropy=x["entropy"],
            entropy_coef=0.25,
            clip_eps=0.1,
            clip_eps_high=0.3,
        )

    return jax.value_and_grad(loss, has_aux=True)(x["logprobs"])


@given(batch=batches())
@CHECK
def test_weights_and_a_kl_term(batch):
    (loss, metrics), gradient = weighted_actor(batch)
    mask, weights = batch["mask"], batch["weights"]
    count = max(mask.sum(), 1)
    names = ("logprobs", "old_logprobs", "advantages")
    policy = weights * oracles.ppo_terms(*(batch[n] for n in names), 0.1, 0.3)
    log_ratio = batch["logprobs"].astype(np.float64) - batch["ref_logprobs"]
    kl = batch["kl_coef"][:, None] * log_ratio**2 / 2
    policy, kl, entropy = (
        x.sum(where=mask) / count for x in (policy, kl, batch["entropy"])
    )
    np.testing.assert_allclose(metrics["policy_loss"], policy, **TOLERANCE)
    np.testing.assert_allclose(metrics["kl_loss"], kl, **TOLERANCE)
    np.testing.assert_allclose(metrics["entropy"], entropy, **TOLERANCE)
    np.testing.assert_allclose(loss, policy - 0.25 * entropy + kl, rtol=1e-5, atol=1e-5)
    _, unweighted = policy_terms(batch, 0.1, 0.3)
    want = weights * np.asarray(unweighted) + batch["kl_coef"][:, None] * log_ratio
    np.testing.assert_allclose(
        gradient, np.where(mask, want, 0) / count, rtol=1e-4, atol=1e-5
    )


@jax.jit
def masked_critic(x, value_mask):
    experience = experience_of(x, value_mask=value_mask)

    def loss(values):
        return losses.critic_loss(values, experience, half=False)

    return jax.value_and_grad(loss, has_aux=True)(x["values"])


@given(batch=batches(), value_mask=any_masks)
@CHECK
def test_the_critic_has_a_mask_of_its_own(batch, value_mask):
    (loss, metrics), gradient = masked_critic(batch, value_mask)
    count = max(value_mask.sum(), 1)
    names = ("values", "old_values", "returns")
    terms = 2 * oracles.value_terms(*(batch[n] for n in names), 0.2)
    np.testing.assert_allclose(loss, terms.sum(where=value_mask) / count, **TOLERANCE)
    assert metrics["value_loss"] == loss
    _, free = value_terms(batch, 0.2, False)
    want = np.where(value_mask, free, 0) / count
    np.testing.assert_allclose(gradient, want, **TOLERANCE)


# ---- reductions ----

reduce = {mode: jax.jit(partial(aggregate, mode=mode)) for mode in MODES}


@given(terms=arrays((B, T)), mask=any_masks)
@CHECK
def test_each_reduction_by_loops(terms, mask):
    rows = [row[m].astype(np.float64) for row, m in zip(terms, mask, strict=True)]
    rows = [row for row in rows if len(row)]
    total, tokens = sum(row.sum() for row in rows), sum(len(row) for row in rows)
    want = {
        "token-sum": total,
        "token-mean": total / max(tokens, 1),
        "seq-mean-token-sum": total / max(len(rows), 1),
        "seq-mean-token-sum-norm": total / max(len(rows), 1) / T,
        "seq-mean-token-mean": sum(row.mean() for row in rows) / max(len(rows), 1),
    }
    for mode in MODES:
        np.testing.assert_allclose(reduce[mode](terms, mask), want[mode], **TOLERANCE)


@given(terms=arrays((B, T)), length=st.integers(1, T), mask=ragged_masks(shortest=1))
@CHECK
def test_means_of_tokens_and_of_rows_agree_for_equal_lengths(terms, length, mask):
    equal = np.broadcast_to(np.arange(T) < length, (B, T))
    by_token, by_row = (
        reduce[mode](terms, equal) for mode in ("token-mean", "seq-mean-token-mean")
    )
    np.testing.assert_allclose(by_token, by_row, **TOLERANCE)
    # And for no others: a row that stands out shows.
    shortest, longest = np.argsort(mask.sum(axis=1))[[0, -1]]
    standing_out = np.zeros((B, T), np.float32)
    standing_out[longest] = 1.0
    by_token, by_row = (
        reduce[mode](standing_out, mask)
        for mode in ("token-mean", "seq-mean-token-mean")
    )
    assert mask[shortest].sum() < mask[longest].sum()
    assert by_token > by_row + 1e-3
