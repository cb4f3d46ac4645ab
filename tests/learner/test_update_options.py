"""`update.py`: early stopping, critic warm-up, slow critic, prepared minibatches."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from bare_models import context_logits, context_params, context_values

from rlhf_jax.algo.minibatches import split_minibatches
from rlhf_jax.algo.options import AdvantageOptions, PolicyLossOptions
from rlhf_jax.learner import (
    ActorCritic,
    count_experience,
    init_train_state,
    make_update,
    ppo_objective,
    separate_networks,
    step_keys,
)
from rlhf_jax.learner.finite import first_nonfinite
from rlhf_jax.rollout import token_logprobs_from_logits, values_from_sequence
from rlhf_jax.rollout.experience import whiten_minibatch

EPOCHS, MINIBATCHES = 2, 4
adam, sgd = optax.adam(0.02), optax.sgd(0.5)


def state_of(params, optimizer=adam, **options):
    # A copy: the update donates its state.
    return init_train_state(
        jax.random.key(3),
        jax.tree.map(jnp.copy, params),
        ActorCritic(actor=optimizer, critic=optimizer),
        kl_coef=0.05,
        **options,
    )


@pytest.fixture(scope="module")
def update_of(objective):
    """`make_update` of the small actor and critic."""

    def build(optimizer=adam, objective=objective, **options):
        options = {"num_epochs": EPOCHS, "num_minibatches": MINIBATCHES} | options
        optimizers = ActorCritic(actor=optimizer, critic=optimizer)
        return make_update(objective, optimizers, **options)

    return build


@pytest.fixture(scope="module")
def plain(update_of):
    """One program, without any option, for all tests that need no other."""
    return update_of()


def count(opt_state):
    return int(optax.tree.get(opt_state, "count"))


def host(tree):
    """Copies that no donation takes away."""
    return jax.tree.map(np.array, tree)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want
    )


@pytest.fixture(scope="module")
def step_by_step(objective):
    """The optimizer steps of one update, one program call each, outside `update.py`.

    Returns the parameters before every step, and after the last; and the approximate
    KL that each step's minibatch found.
    """

    def run(state, experience, optimizer, *, minibatches, epochs=1, prepare=None):
        @jax.jit
        def step(params, opt_state, minibatch):
            counts = count_experience(minibatch)
            fn = jax.value_and_grad(objective, has_aux=True)
            (_, metrics), grads = fn(params, minibatch, counts)
            actor, actor_opt = optimizer.update(grads.actor, opt_state.actor)
            critic, critic_opt = optimizer.update(grads.critic, opt_state.critic)
            updates = ActorCritic(actor=actor, critic=critic)
            opt_state = ActorCritic(actor=actor_opt, critic=critic_opt)
            params = optax.apply_updates(params, updates)
            return params, opt_state, metrics["policy/approx_kl"]

        params, opt_state = state.params, state.opt_state
        seen, kls = [host(params)], []
        for key in jax.random.split(step_keys(state)[1], epochs):
            parts = split_minibatches(key, experience, num_minibatches=minibatches)
            for i in range(minibatches):
                minibatch = jax.tree.map(lambda x, i=i: x[i], parts)
                minibatch = prepare(minibatch) if prepare else minibatch
                params, opt_state, kl = step(params, opt_state, minibatch)
                seen.append(host(params))
                kls.append(float(kl))
        return seen, kls

    return run


# ---- early stopping ----


@pytest.fixture(scope="module")
def steps(step_by_step, on_policy):
    actor, critic = context_params(jax.random.key(0), vocab_size=10, width=6)
    state = state_of(ActorCritic(actor=actor, critic=critic))
    return step_by_step(state, on_policy, adam, minibatches=MINIBATCHES, epochs=EPOCHS)


def test_an_update_is_its_steps(plain, params, on_policy, steps):
    states, kls = steps
    state, metrics = plain(state_of(params), on_policy)
    assert_close(host(state.params), states[-1])
    np.testing.assert_allclose(metrics["policy/approx_kl"], np.mean(kls), rtol=1e-4)
    assert "policy/steps" not in metrics


@pytest.mark.parametrize("taken", [2, 4])  # in the first epoch, and in the second
def test_steps_after_the_limit_change_nothing(
    update_of, params, on_policy, steps, taken
):
    states, kls = steps
    limit = (max(kls[:taken]) + kls[taken]) / 2
    assert max(kls[:taken]) < limit < kls[taken]
    update = update_of(max_kl=limit)
    state, metrics = update(state_of(params), on_policy)
    # An update with fewer minibatches.
    assert_close(host(state.params), states[taken])
    assert count(state.opt_state.actor) == count(state.opt_state.critic) == taken
    # The one that found the policy too far off was looked at, and no later one.
    assert metrics["policy/steps"] == taken
    looked_at = np.mean(kls[: taken + 1])
    np.testing.assert_allclose(metrics["policy/approx_kl"], looked_at, rtol=1e-4)
    assert state.step == 1
    # Of answers by another policy not even the first step is taken.
    far = dataclasses.replace(on_policy, old_logprobs=on_policy.old_logprobs - 1)
    before = host(state.params)
    state, metrics = update(state, far)
    assert metrics["policy/steps"] == 0
    assert metrics["policy/approx_kl"] == metrics["policy/first_approx_kl"] > limit
    assert_equal(host(state.params), before)
    assert count(state.opt_state.actor) == taken
    assert state.step == 2  # the update itself was sound


def test_a_limit_out_of_reach_changes_nothing(update_of, plain, params, on_policy):
    limited = update_of(max_kl=1e6)
    state, metrics = plain(state_of(params), on_policy)
    other, more = limited(state_of(params), on_policy)
    assert_close(host(other.params), host(state.params))
    assert more.pop("policy/steps") == EPOCHS * MINIBATCHES
    assert_close(more, metrics)
    # What is not finite is still found, and stops at its minibatch.
    assert on_policy.mask[5, 0]
    bad = on_policy.advantages.at[5, 0].set(jnp.nan)
    state, metrics = limited(
        state_of(params), dataclasses.replace(on_policy, advantages=bad)
    )
    first = first_nonfinite(metrics)["policy_loss"]
    assert 0 <= first < MINIBATCHES
    assert state.step == 0
    assert count(state.opt_state.actor) == 0


# ---- warm-up of the critic, slow critic ----


def test_at_first_the_critic_learns_alone_and_a_copy_trails_it(
    update_of, plain, params, experience
):
    update = update_of(critic_warmup=2, slow_critic_decay=0.75)
    state, usual = state_of(params, slow_critic=True), state_of(params)
    fresh, slow = host(state.opt_state.actor), host(params.critic)
    for updates_done in (1, 2, 3):
        state, metrics = update(state, experience)
        usual, usual_metrics = plain(usual, experience)
        assert state.step == updates_done
        # The critic is a network of its own and never hears of the actor.
        assert_close(host(state.params.critic), host(usual.params.critic))
        assert count(state.opt_state.critic) == updates_done * EPOCHS * MINIBATCHES
        np.testing.assert_allclose(
            metrics["value/loss"], usual_metrics["value/loss"], rtol=1e-5
        )
        slow = jax.tree.map(
            lambda s, c: 0.75 * s + 0.25 * np.asarray(c), slow, state.params.critic
        )
        assert_close(host(state.slow_critic), slow)
        if updates_done <= 2:
            assert_equal(host(state.params.actor), host(params.actor))
            assert_equal(host(state.opt_state.actor), fresh)
            assert metrics["optim/actor_grad_norm"] > 0  # of steps that were not taken
    assert count(state.opt_state.actor) == EPOCHS * MINIBATCHES
    moved = np.abs(state.params.actor["kernel"] - params.actor["kernel"]).max()
    assert moved > 1e-3


def test_without_a_decay_a_slow_critic_stays(update_of, plain, params, experience):
    state, _ = plain(state_of(params, slow_critic=True), experience)
    assert_equal(host(state.slow_critic), host(params.critic))
    state, _ = jax.eval_shape(
        update_of(slow_critic_decay=0.5), state_of(params), experience
    )
    assert state.slow_critic is None


# ---- prepared minibatches ----


def test_minibatches_are_whitened_each_by_itself_and_whole(
    update_of, step_by_step, params, experience
):
    def by_hand(minibatch):
        mask, raw = np.asarray(minibatch.mask), np.asarray(minibatch.advantages)
        white = np.zeros(mask.shape, np.float32)
        white[mask] = oracles.whiten(raw[mask].astype(np.float64), ddof=1)
        return dataclasses.replace(minibatch, advantages=jnp.asarray(white))

    off_scale = dataclasses.replace(
        experience, advantages=3 * experience.advantages + 2
    )
    # Plain gradient descent: Adam would blow up the rounding of gradients near 0.
    want, _ = step_by_step(
        state_of(params, sgd), off_scale, sgd, minibatches=2, prepare=by_hand
    )
    options = AdvantageOptions(whiten="minibatch", ddof=1)
    update = update_of(
        sgd,
        num_epochs=1,
        num_minibatches=2,
        num_microbatches=4,
        prepare=partial(whiten_minibatch, options=options),
    )
    state, _ = update(state_of(params, sgd), off_scale)
    assert_close(host(state.params), want[-1])
    raw, _ = step_by_step(state_of(params, sgd), off_scale, sgd, minibatches=2)
    assert np.abs(raw[-1].actor["kernel"] - want[-1].actor["kernel"]).max() > 1e-2


# ---- the mean of the means of microbatches ----


def loss_of_networks(**options):
    return ppo_objective(
        separate_networks(
            token_logprobs_fn=token_logprobs_from_logits(context_logits),
            values_fn=values_from_sequence(context_values),
        ),
        **options,
    )


def test_the_mean_of_the_means_of_microbatches(update_of, params, experience):
    # With a single minibatch no row moves; microbatch k takes rows k, k + 4, k + 8, …
    objective = jax.jit(loss_of_networks())

    def metrics_of(part):
        return objective(params, part, count_experience(part))[1]

    means = [
        metrics_of(jax.tree.map(lambda x, k=k: x[k::4], experience)) for k in range(4)
    ]
    update = update_of(
        sgd,
        loss_of_networks(
            policy_loss=PolicyLossOptions(mean_of_means=True), num_microbatches=4
        ),
        num_epochs=1,
        num_minibatches=1,
        num_microbatches=4,
    )
    _, metrics = update(state_of(params, sgd), experience)
    whole = metrics_of(experience)
    for name in ("policy/loss", "value/loss", "policy/approx_kl"):
        want = np.mean([part[name] for part in means])
        np.testing.assert_allclose(metrics[name], want, rtol=1e-4, atol=1e-6)
        assert not np.isclose(metrics[name], whole[name], rtol=1e-3)
