"""`update.py`: the epochs, minibatches and steps of one update, and what stops it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algo.types import Experience
from rlhf_jax.learner import (
    ActorCritic,
    TrainState,
    init_train_state,
    make_optimizer,
    make_update,
)
from rlhf_jax.learner.finite import NonFiniteError, first_nonfinite, pop_nonfinite

EPOCHS, MINIBATCHES = 2, 4
adamw = make_optimizer(0.02)


def state_of(params, optimizer=adamw, seed=3, **options):
    # A copy: the update donates its state.
    return init_train_state(
        jax.random.key(seed),
        jax.tree.map(jnp.copy, params),
        ActorCritic(actor=optimizer, critic=optimizer),
        kl_coef=0.05,
        **options,
    )


@pytest.fixture(scope="session")
def update_of(objective):
    """`make_update` of the small actor and critic."""

    def build(optimizer=adamw, **options):
        options = {"num_epochs": EPOCHS, "num_minibatches": MINIBATCHES} | options
        optimizers = ActorCritic(actor=optimizer, critic=optimizer)
        return make_update(objective, optimizers, **options)

    return build


@pytest.fixture(scope="session")
def update(update_of):
    """One program for all tests that need no other."""
    return update_of()


def count(opt_state):
    """Steps taken, from Adam's own counter."""
    return int(optax.tree.get(opt_state, "count"))


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def arrays(tree):
    """Copies on the host, which no donation can take away; keys as their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(
        lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree
    )


# ---- steps ----


def test_the_first_minibatch_has_ratio_one_and_nothing_is_clipped(
    update, params, on_policy
):
    _, metrics = update(state_of(params), on_policy)
    assert metrics["policy/first_clip_fraction"] == 0
    assert metrics["policy/first_approx_kl"] < 1e-10
    # The later ones have moved.
    assert metrics["policy/clip_fraction"] > 0
    assert metrics["policy/approx_kl"] > 1e-4


def test_a_single_step_has_ratio_one_and_the_mean_advantage_as_loss(
    update_of, params, on_policy
):
    update = update_of(num_epochs=1, num_minibatches=1)
    _, metrics = update(state_of(params), on_policy)
    np.testing.assert_allclose(metrics["policy/ratio_mean"], 1.0, rtol=1e-6)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["value/clip_fraction"] == 0
    # Whitened advantages have mean 0, and the values are those of the rollout.
    np.testing.assert_allclose(metrics["policy/loss"], 0.0, atol=1e-6)
    gap = np.asarray(on_policy.old_values - on_policy.returns)[on_policy.mask]
    np.testing.assert_allclose(metrics["value/loss"], 0.5 * np.mean(gap**2), rtol=1e-5)


def test_epochs_times_minibatches_optimizer_steps(update, params, experience):
    state = state_of(params)
    for updates_done in (1, 2):
        state, metrics = update(state, experience)
        assert count(state.opt_state.actor) == updates_done * EPOCHS * MINIBATCHES
        assert count(state.opt_state.critic) == updates_done * EPOCHS * MINIBATCHES
        assert state.step == updates_done
    for name, metric in metrics.items():
        is_term = name.startswith("terms/")
        assert metric.shape == ((EPOCHS * MINIBATCHES,) if is_term else ())
        assert metric.dtype == jnp.float32
        assert np.isfinite(metric).all()


def test_the_key_and_the_kl_coefficient_pass_through(update, params, experience):
    before = arrays(state_of(params))
    after, _ = update(state_of(params), experience)
    after = arrays(after)
    assert_equal((after.key, after.kl_coef), (before.key, before.kl_coef))


def test_microbatches_of_unequal_token_counts_change_nothing(
    update_of, params, experience
):
    # Plain gradient descent: Adam would blow up the rounding of gradients near 0.
    sgd = optax.sgd(0.5)
    results = [
        update_of(sgd, num_minibatches=2, num_microbatches=n)(
            state_of(params, sgd), experience
        )
        for n in (1, 4)
    ]
    (whole, whole_metrics), (parts, parts_metrics) = results
    assert np.abs(whole.params.critic["score"] - params.critic["score"]).max() > 0.01
    for got, want in (
        (parts.params.actor, whole.params.actor),
        (parts.params.critic, whole.params.critic),
        (parts_metrics, whole_metrics),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            got,
            want,
        )


def test_each_network_has_its_own_gradient_clipping(update, params, experience):
    plain, plain_metrics = update(state_of(params), experience)
    steep, steep_metrics = update(
        state_of(params),
        dataclasses.replace(experience, advantages=1e4 * experience.advantages),
    )
    assert steep_metrics["optim/actor_grad_norm"] > 100
    assert_equal(steep.params.critic, plain.params.critic)
    assert_equal(
        steep_metrics["optim/critic_grad_norm"], plain_metrics["optim/critic_grad_norm"]
    )


# ---- shuffles ----


def rows_of_every_step(seed, num_updates):
    """`[updates, epochs, minibatches, B]` bool: which rows each optimizer step read.

    The gradient of this objective marks the rows of the minibatch, and this optimizer
    keeps all gradients it is given.
    """
    batch, steps = 8, EPOCHS * MINIBATCHES

    def objective(params, rows, _):
        names = ("loss", "entropy", "clip_fraction", "approx_kl")
        metrics = {f"policy/{name}": jnp.float32(0) for name in names}
        loss = jnp.sum(params.actor[rows.tokens[:, 0]]) + 0 * params.critic
        return loss, metrics | {"value/loss": jnp.float32(0)}

    def keep(grad, log, params=None):
        row = jnp.arange(steps)[:, None] == log["step"]
        rows = jnp.where(row, grad[None, :], log["rows"])
        return jnp.zeros_like(grad), {"step": log["step"] + 1, "rows": rows}

    recorder = optax.GradientTransformation(
        lambda _: {"step": jnp.int32(0), "rows": jnp.zeros((steps, batch))}, keep
    )
    optimizers = ActorCritic(actor=recorder, critic=optax.sgd(0.1))
    zeros = jnp.zeros((batch, 1))
    experience = Experience(
        tokens=jnp.arange(batch)[:, None],
        sequence_mask=zeros == 0,
        mask=zeros == 0,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        old_values=zeros,
        advantages=zeros,
        returns=zeros,
    )
    update = make_update(
        objective, optimizers, num_epochs=EPOCHS, num_minibatches=MINIBATCHES
    )
    state = init_train_state(
        jax.random.key(seed),
        ActorCritic(actor=jnp.zeros(batch), critic=jnp.zeros(())),
        optimizers,
        kl_coef=0.0,
    )
    logs = []
    for _ in range(num_updates):
        state, _ = update(state, experience)
        logs.append(np.array(state.opt_state.actor["rows"]))
        state = dataclasses.replace(
            state,
            opt_state=ActorCritic(
                actor=recorder.init(state.params.actor), critic=state.opt_state.critic
            ),
        )
    return np.stack(logs).reshape(num_updates, EPOCHS, MINIBATCHES, batch)


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own():
    rows = rows_of_every_step(seed=0, num_updates=3)
    np.testing.assert_array_equal(rows.sum(axis=2), np.ones((3, EPOCHS, 8)))
    np.testing.assert_array_equal(
        rows.sum(axis=3), np.full((3, EPOCHS, MINIBATCHES), 2)
    )
    orders = {rows[i, j].tobytes() for i in range(3) for j in range(EPOCHS)}
    assert len(orders) == 3 * EPOCHS
    np.testing.assert_array_equal(rows_of_every_step(0, 1), rows[:1])
    assert not np.array_equal(rows_of_every_step(1, 1), rows[:1])


# ---- the compiled program ----


def test_one_shape_compiles_once_and_moves_nothing_from_the_host(
    objective, params, on_policy, experience
):
    counted = chex.assert_max_traces(objective, n=1)
    optimizers = ActorCritic(actor=adamw, critic=adamw)
    update = make_update(counted, optimizers, num_epochs=2, num_minibatches=4)
    state = state_of(params)
    with jax.transfer_guard("disallow"):
        for batch in (on_policy, experience, on_policy):
            state, metrics = update(state, batch)
    assert state.step == 3
    assert np.isfinite(metrics["policy/loss"])


def test_the_state_is_donated_and_nothing_else_is(update, params, experience):
    state = state_of(params)
    want = arrays((params, experience))
    old = jax.tree.leaves((state.params, state.opt_state))
    state, _ = update(state, experience)
    assert all(leaf.is_deleted() for leaf in old)
    assert_equal(arrays((params, experience)), want)
    moved = np.abs(state.params.actor["kernel"] - params.actor["kernel"]).max()
    assert moved > 1e-3


# ---- what is not finite ----


def poisoned(experience, row):
    """An advantage of one real token is NaN."""
    assert experience.mask[row, 0]
    return dataclasses.replace(
        experience, advantages=experience.advantages.at[row, 0].set(jnp.nan)
    )


def assert_finite(state: TrainState):
    for leaf in jax.tree.leaves(arrays(state)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_advantage_undoes_the_whole_update(update, params, experience, seed):
    before = state_of(params, seed=seed)
    before, _ = update(before, experience)  # moments of Adam are not 0
    want = arrays(before)
    state, metrics = update(before, poisoned(experience, 5))
    first = first_nonfinite(metrics)["policy_loss"]
    assert 0 <= first < MINIBATCHES  # somewhere in the first epoch
    assert_equal(arrays(state), want)
    assert first_nonfinite(metrics)["value_loss"] == -1
    assert first_nonfinite(metrics)["critic_gradient"] == -1
    losses = metrics["terms/policy_loss"]
    assert losses.shape == (EPOCHS * MINIBATCHES,)
    assert np.isfinite(losses[:first]).all() and np.isnan(losses[first])
    with pytest.raises(
        NonFiniteError, match=rf"step 7: policy_loss .*optimizer step {first} of"
    ):
        pop_nonfinite(jax.device_get(metrics), step=7)


def test_without_undo_the_steps_before_the_bad_one_remain(
    update_of, params, experience
):
    update, seeds = update_of(undo=False), range(12)
    results = [update(state_of(params, seed=s), poisoned(experience, 5)) for s in seeds]
    firsts = [first_nonfinite(m)["policy_loss"] for _, m in results]
    assert len(set(firsts)) > 1  # the shuffle decides when the row comes
    for first, (state, _) in zip(firsts, results, strict=True):
        # Adam has counted the steps before it, and none after it.
        assert count(state.opt_state.actor) == count(state.opt_state.critic) == first
        assert state.step == 0
        assert_finite(state)
    at_once = results[firsts.index(0)][0]
    assert_equal(arrays(at_once.params), arrays(params))
    later = results[firsts.index(max(firsts))][0]
    assert np.abs(later.params.actor["kernel"] - params.actor["kernel"]).max() > 1e-3


def test_undo_changes_nothing_in_a_healthy_update(
    update, update_of, params, experience
):
    want, _ = update_of(undo=False)(state_of(params), experience)
    state, _ = update(state_of(params), experience)
    assert_equal(arrays(state), arrays(want))


def test_undo_costs_a_copy_only_with_several_steps(on_policy):
    # A matrix of 256 KiB, and two moments of Adam; everything else is tiny.
    def objective(params, batch, divisor):
        loss = jnp.mean(params.actor**2) + 0.0 * jnp.sum(batch.advantages)
        return loss, {"policy/loss": loss, "policy/approx_kl": loss}

    def temporary(undo, num_minibatches):
        optimizers = ActorCritic(actor=optax.adam(0.1), critic=optax.identity())
        params = ActorCritic(actor=jnp.ones((256, 256)), critic={})
        state = init_train_state(jax.random.key(0), params, optimizers, kl_coef=0.0)
        update = make_update(
            objective,
            optimizers,
            num_epochs=1,
            num_minibatches=num_minibatches,
            undo=undo,
        )
        compiled = update.lower(state, on_policy).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = 4 * 256 * 256
    assert temporary(True, 1) == temporary(False, 1)
    more = temporary(True, 4) - temporary(False, 4)
    assert 2 * size <= more <= 4 * size


@pytest.mark.parametrize("healthy", [True, False])
def test_what_is_carried_changes_with_the_update_only(
    update, params, experience, healthy
):
    before = state_of(params, slow_critic=True)
    coef, moments = float(before.kl_coef), arrays(before.score_moments)
    carried = {
        "kl_coef": jnp.float32(0.75),
        "score_moments": jax.tree.map(lambda x: x + 2, before.score_moments),
    }
    batch = experience if healthy else poisoned(experience, 5)
    state, _ = update(before, batch, None, carried)
    assert state.kl_coef == (0.75 if healthy else coef)
    want = jax.tree.map(lambda x: x + 2, moments) if healthy else moments
    assert_equal(arrays(state.score_moments), want)


def test_an_infinite_weight_leaves_the_slow_critic_as_it_was(
    update_of, params, experience
):
    # The first step of a rate of inf makes the weights infinite; the second one fails.
    wild = optax.sgd(np.inf)
    update = update_of(wild, slow_critic_decay=0.75)
    before = state_of(params, wild, slow_critic=True)
    want = arrays(before)
    state, metrics = update(before, experience)
    assert min(s for s in first_nonfinite(metrics).values() if s >= 0) == 1
    assert_equal(arrays(state), want)


def test_a_bad_critic_parameter_stops_the_first_step(update, params, experience):
    critic = params.critic | {"score": params.critic["score"].at[2].set(jnp.nan)}
    bad = ActorCritic(actor=params.actor, critic=critic)
    state, metrics = update(state_of(bad), experience)
    assert first_nonfinite(metrics)["value_loss"] == 0
    assert first_nonfinite(metrics)["critic_gradient"] == 0
    assert first_nonfinite(metrics)["policy_loss"] == -1
    assert state.step == 0
    assert_equal(arrays(state.params), arrays(bad))  # the actor as well
    assert count(state.opt_state.actor) == 0
    assert_finite(state.opt_state)
    with pytest.raises(NonFiniteError, match=r"value_loss .*optimizer step 0 of"):
        pop_nonfinite(jax.device_get(metrics), step=1)


def test_training_goes_on_from_a_kept_state(update, params, experience):
    stopped, _ = update(state_of(params), poisoned(experience, 5))
    went_on, metrics = update(stopped, experience)
    assert went_on.step == 1
    metrics = pop_nonfinite(jax.device_get(metrics), step=1)
    assert "policy/loss" in metrics
    assert not any(name.startswith("terms/") for name in metrics)
