"""`losses.py` by hand, against NumPy loops, by gradients and invariance."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax.algo.losses import actor_loss, clipped_value_loss, critic_loss, ppo_loss
from rlhf_jax.algo.masking import Aggregation
from rlhf_jax.algo.policy_losses import sapo_loss
from rlhf_jax.algo.types import Experience

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
MODES = get_args(Aggregation)


@pytest.fixture
def arrays(rng, mask):
    """New log-probabilities, values and entropies, all away from the old ones."""
    logprobs, values = rng.normal(0, 0.5, (2, *mask.shape)).astype(np.float32)
    entropy = rng.exponential(size=mask.shape).astype(np.float32)
    return jnp.array(logprobs - 1), jnp.array(values), jnp.array(entropy)


@pytest.fixture
def experience(rng, mask):
    old, ref, values, advantages, returns = (
        jnp.array(x, jnp.float32) for x in rng.normal(0, 0.5, (5, *mask.shape))
    )
    return Experience(
        mask=jnp.array(mask),
        old_logprobs=old - 1,
        ref_logprobs=ref - 1,
        old_values=values,
        advantages=advantages,
        returns=returns,
    )


@pytest.mark.parametrize("eps", [0.2, 0.5])
def test_value_loss_matches_loop(maybe_jit, arrays, experience, eps):
    args = (arrays[1], experience.old_values, experience.returns)
    got = maybe_jit(functools.partial(clipped_value_loss, clip_eps=eps))(*args)
    np.testing.assert_allclose(got, oracles.value_terms(*args, eps), **TOLERANCE)


@pytest.mark.parametrize(
    ("value", "old", "ret", "loss", "grad"),
    [
        (1.0, 0.5, 2.0, 0.845, 0.0),  # moved 0.5 towards R: V_c = 0.7, ½·1.3²
        (1.0, 0.5, 0.0, 0.5, 1.0),  # moved away: ½·1² > ½·0.7²
        (0.6, 0.5, 2.0, 0.98, -1.4),  # within: ½·1.4²
    ],
)
def test_value_loss_by_hand(value, old, ret, loss, grad):
    def fn(v):
        x = (v + jnp.zeros((1, 1)), jnp.array([[old]]), jnp.array([[ret]]))
        return clipped_value_loss(*x, clip_eps=0.2)[0, 0]

    got = jax.value_and_grad(fn)(value)
    np.testing.assert_allclose(got, (loss, grad), rtol=1e-5, atol=1e-7)


def test_value_clip_only_adds(arrays, experience):
    args = (arrays[1], experience.old_values, experience.returns)
    plain = clipped_value_loss(*args, clip_eps=None)
    np.testing.assert_allclose(plain, (args[0] - args[2]) ** 2 / 2, rtol=1e-5)
    assert np.all(clipped_value_loss(*args) >= plain)
    unmoved = (experience.old_values, *args[1:])
    np.testing.assert_allclose(
        clipped_value_loss(*unmoved), clipped_value_loss(*unmoved, clip_eps=None)
    )


def test_without_the_half_it_is_twice_as_much(arrays, experience):
    args = (arrays[1], experience.old_values, experience.returns)
    np.testing.assert_array_equal(
        clipped_value_loss(*args, half=False), 2 * clipped_value_loss(*args)
    )
    loss, metrics = critic_loss(arrays[1], experience, half=False)
    np.testing.assert_array_equal(loss, 2 * critic_loss(arrays[1], experience)[0])
    assert metrics["value_loss"] == loss


def test_ratio_one(experience):
    # The gradient is that of −A·log π; nothing is clipped.
    old, mask = experience.old_logprobs, np.asarray(experience.mask)

    def fn(logprobs):
        return actor_loss(logprobs, experience)

    (loss, metrics), grad = jax.value_and_grad(fn, has_aux=True)(old)
    advantages = np.where(mask, experience.advantages, 0)
    np.testing.assert_allclose(grad, -advantages / 12, **TOLERANCE)
    np.testing.assert_allclose(loss, -advantages.sum() / 12, **TOLERANCE)
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0
    assert metrics["ratio_mean"] == 1


def test_without_clipping_it_is_the_importance_sampled_gradient(arrays, experience):
    def fn(logprobs):
        return actor_loss(logprobs, experience, clip_eps=1e9)[0]

    ratio = np.exp(np.asarray(arrays[0]) - np.asarray(experience.old_logprobs))
    weighted = np.where(experience.mask, ratio * np.asarray(experience.advantages), 0)
    np.testing.assert_allclose(jax.grad(fn)(arrays[0]), -weighted / 12, **TOLERANCE)


def test_gradient_is_zero_exactly_where_clipped(arrays, experience):
    logprobs, old, advantages = (
        np.asarray(x)
        for x in (arrays[0], experience.old_logprobs, experience.advantages)
    )
    grad = jax.grad(lambda x: actor_loss(x, experience)[0])(arrays[0])
    ratio = np.exp(logprobs - old)
    clipped = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    assert clipped.any() and not clipped.all()
    np.testing.assert_array_equal(
        np.asarray(grad) == 0, clipped | ~np.asarray(experience.mask)
    )


def test_total_by_hand(maybe_jit, arrays, experience):
    mask = np.asarray(experience.mask)
    fn = functools.partial(ppo_loss, value_coef=0.25, entropy_coef=0.03)
    logprobs, values, entropy = arrays
    loss, metrics = maybe_jit(fn)(logprobs, values, experience, entropy=entropy)
    policy = oracles.ppo_terms(
        arrays[0], experience.old_logprobs, experience.advantages, 0.2, 0.2
    )
    value = oracles.value_terms(
        arrays[1], experience.old_values, experience.returns, 0.2
    )
    policy, value = policy[mask].mean(), value[mask].mean()
    entropy = np.asarray(arrays[2])[mask].mean()
    np.testing.assert_allclose(
        loss, policy - 0.03 * entropy + 0.25 * value, **TOLERANCE
    )
    np.testing.assert_allclose(metrics["policy_loss"], policy, **TOLERANCE)
    np.testing.assert_allclose(metrics["value_loss"], value, **TOLERANCE)
    np.testing.assert_allclose(metrics["entropy"], entropy, **TOLERANCE)


def test_it_is_its_two_parts(arrays, experience):
    logprobs, values, entropy = arrays
    bonus = {"entropy": entropy, "entropy_coef": 0.03}
    loss, metrics = ppo_loss(logprobs, values, experience, **bonus, value_coef=0.25)
    actor, of_actor = actor_loss(logprobs, experience, **bonus)
    critic, of_critic = critic_loss(values, experience)
    np.testing.assert_allclose(loss, actor + 0.25 * critic, rtol=1e-6)
    assert metrics == of_actor | of_critic
    assert set(metrics) == {
        *("policy_loss", "value_loss", "entropy", "approx_kl", "ratio_mean"),
        *("clip_fraction", "value_clip_fraction"),
    }


def test_the_critic_counts_in_full_and_all_options_reach_their_part(arrays, experience):
    logprobs, values, _ = arrays
    experience = dataclasses.replace(experience, kl_coef=jnp.array([0.5, 0.25, 2.0]))
    for of_actor, of_critic in (
        ({}, {}),
        (
            {"clip_eps": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.5},
            {"value_clip_eps": 0.1},
        ),
        ({"log_ratio_clamp": 0.25}, {"half": False}),
        ({"policy_loss_fn": sapo_loss, "kl_fn": lambda new, ref: (new - ref) / 8}, {}),
        ({"importance_weighted_kl": True}, {"value_clip_eps": None}),
    ):
        loss, metrics = ppo_loss(logprobs, values, experience, **of_actor, **of_critic)
        actor, actor_metrics = actor_loss(logprobs, experience, **of_actor)
        critic, critic_metrics = critic_loss(values, experience, **of_critic)
        np.testing.assert_allclose(loss, actor + critic, rtol=1e-6)
        assert metrics == actor_metrics | critic_metrics


def test_without_an_entropy_there_is_no_bonus(arrays, experience):
    logprobs, _, entropy = arrays
    loss, metrics = actor_loss(logprobs, experience)
    watched, with_entropy = actor_loss(logprobs, experience, entropy=entropy)
    assert loss == watched and "entropy" not in metrics
    assert metrics == {k: v for k, v in with_entropy.items() if k != "entropy"}
    with pytest.raises(ValueError, match=r"entropy_coef=0\.1: needs `entropy`"):
        actor_loss(logprobs, experience, entropy_coef=0.1)


def test_a_kl_weighted_by_the_ratio(arrays, experience):
    # ρ · β · k2 as value, and as gradient ρ · β · log(π/π_ref): ρ is held.
    logprobs, old, ref = (
        np.asarray(x, np.float64)
        for x in (arrays[0], experience.old_logprobs, experience.ref_logprobs)
    )
    beta, mask = np.array([[0.5], [0.25], [2.0]]), np.asarray(experience.mask)
    experience = dataclasses.replace(
        experience,
        advantages=jnp.zeros(mask.shape),
        kl_coef=jnp.array(beta[:, 0], jnp.float32),
    )
    fn = functools.partial(
        actor_loss, experience=experience, importance_weighted_kl=True
    )
    (loss, metrics), grad = jax.value_and_grad(fn, has_aux=True)(arrays[0])
    weight = beta * np.exp(logprobs - old)
    want = (weight * (logprobs - ref) ** 2 / 2)[mask].mean()
    np.testing.assert_allclose(metrics["kl_loss"], want, **TOLERANCE)
    np.testing.assert_allclose(loss, want, **TOLERANCE)
    want = np.where(mask, weight * (logprobs - ref), 0) / 12
    np.testing.assert_allclose(grad, want, **TOLERANCE)


def test_without_a_value_clip_nothing_counts_as_clipped(arrays, experience):
    loss, metrics = critic_loss(arrays[1], experience, value_clip_eps=None)
    error = np.asarray(arrays[1]) - np.asarray(experience.returns)
    want = (error[np.asarray(experience.mask)] ** 2 / 2).mean()
    np.testing.assert_allclose(loss, want, **TOLERANCE)
    assert metrics["value_clip_fraction"] == 0


def ppo_loss_of(arrays, experience, **options):
    logprobs, values, entropy = arrays
    return ppo_loss(logprobs, values, experience, entropy=entropy, **options)


def loss_and_grads(arrays, experience, **options):
    fn = functools.partial(
        ppo_loss_of, experience=experience, entropy_coef=0.03, **options
    )
    return jax.value_and_grad(fn, has_aux=True)(list(arrays))


FIELDS = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_padding_is_never_read(arrays, experience, garbage):
    mask = experience.mask
    clean = loss_and_grads(arrays, experience)
    dirty = {
        name: jnp.where(mask, getattr(experience, name), garbage) for name in FIELDS
    }
    other = loss_and_grads(
        [jnp.where(mask, x, garbage) for x in arrays],
        dataclasses.replace(experience, **dirty),
    )
    jax.tree.map(np.testing.assert_array_equal, other, clean)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(other))


@pytest.mark.parametrize("mode", MODES)
def test_microbatches_add_up_to_the_minibatch(arrays, experience, mode):
    # Rows of 1, 4 and 7 tokens: every microbatch has another number of them.
    (loss, metrics), grads = loss_and_grads(arrays, experience, aggregation=mode)
    parts = [
        loss_and_grads(
            [x[row : row + 1] for x in arrays],
            jax.tree.map(lambda x, row=row: x[row : row + 1], experience),
            aggregation=mode,
            num_tokens=jnp.int32(12),
            num_sequences=3,
        )
        for row in range(3)
    ]
    np.testing.assert_allclose(sum(p[0][0] for p in parts), loss, **TOLERANCE)
    for name, want in metrics.items():
        got = sum(p[0][1][name] for p in parts)
        np.testing.assert_allclose(got, want, **TOLERANCE, err_msg=name)
    for i, want in enumerate(grads):
        got = np.concatenate([p[1][i] for p in parts])
        np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"seq-mean-token-sum-norm"}))
def test_pad_columns_rows_and_order_change_nothing(arrays, experience, mode):
    (loss, metrics), _ = loss_and_grads(arrays, experience, aggregation=mode)

    def pad(x):  # two columns and an empty row more, and another order
        return jnp.pad(x, ((0, 1), (0, 2)))[jnp.array([2, 3, 0, 1])]

    (other, other_metrics), _ = loss_and_grads(
        [pad(x) for x in arrays], jax.tree.map(pad, experience), aggregation=mode
    )
    np.testing.assert_allclose(other, loss, **TOLERANCE)
    for name, want in metrics.items():
        np.testing.assert_allclose(other_metrics[name], want, **TOLERANCE)


def test_an_empty_batch_gives_zero(arrays, experience):
    empty = dataclasses.replace(experience, mask=jnp.zeros_like(experience.mask))
    for x in jax.tree.leaves(loss_and_grads(arrays, empty)):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_gradients_stop_at_the_frozen_arrays(arrays, experience):
    def fn(frozen):
        return ppo_loss_of(arrays, dataclasses.replace(experience, **frozen))[0]

    grads = jax.grad(fn)({name: getattr(experience, name) for name in FIELDS})
    for x in grads.values():
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_terms_stop_gradients_by_themselves(arrays, experience):
    def total(old_values, returns):
        return jnp.sum(clipped_value_loss(arrays[1], old_values, returns))

    for x in jax.grad(total, argnums=(0, 1))(experience.old_values, experience.returns):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_half_precision_in_float32_out(arrays, experience):
    low = [x.astype(jnp.bfloat16) for x in arrays]
    exact = [x.astype(jnp.float32) for x in low]
    got = ppo_loss_of(low, experience)
    jax.tree.map(np.testing.assert_array_equal, got, ppo_loss_of(exact, experience))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))


def test_integers_and_wrong_options_are_refused(arrays, experience):
    with pytest.raises(AssertionError, match="type"):
        ppo_loss(arrays[0].astype(jnp.int32), arrays[1], experience)
    with pytest.raises(ValueError, match="mode='mean'"):
        ppo_loss_of(arrays, experience, aggregation="mean")
    with pytest.raises(ValueError, match=r"dual_clip=1\.0: expected above 1"):
        ppo_loss_of(arrays, experience, dual_clip=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_eps", 0.1),
        ("clip_eps_high", 0.2),
        ("dual_clip", 3.0),
        ("log_ratio_clamp", 20.0),
    ],
)
def test_options_of_the_clip_beside_another_loss_are_refused(
    arrays, experience, name, value
):
    with pytest.raises(ValueError, match=f"{name}={value}: has no effect with"):
        actor_loss(arrays[0], experience, policy_loss_fn=sapo_loss, **{name: value})
