"""Learning without a critic: the actor's half of PPO, its surrogates, its updates."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bare_models import context_logits, context_params, context_values

from rlhf_jax.algo.losses import critic_loss
from rlhf_jax.algo.options import GroupOptions, KLOptions, PolicyLossOptions
from rlhf_jax.learner import (
    ActorCritic,
    count_experience,
    critic_free_objective,
    init_train_state,
    make_update,
    ppo_objective,
    separate_networks,
)
from rlhf_jax.learner.finite import first_nonfinite
from rlhf_jax.learner.gradients import accumulate_gradients
from rlhf_jax.rollout import (
    make_group_experience,
    score_rollout,
    token_logprobs_from_logits,
    values_from_sequence,
)

B, T, V = 16, 5, 10
TEMPERATURE = 0.7
LOSS_KL = KLOptions(place="loss", estimator="k2")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
close = partial(np.testing.assert_allclose, **TOLERANCE)
token_logprobs = token_logprobs_from_logits(context_logits)
adam = ActorCritic(actor=optax.adam(0.02), critic=optax.identity())


def objective_with(policy_loss=PolicyLossOptions(), kl=LOSS_KL, **options):
    return critic_free_objective(
        token_logprobs,
        temperature=TEMPERATURE,
        policy_loss=policy_loss,
        kl=kl,
        **options,
    )


@pytest.fixture(scope="module")
def actor():
    return context_params(jax.random.key(0), vocab_size=V, width=6)[0]


@pytest.fixture(scope="module")
def scored(rollout, actor):
    reference, _ = context_params(jax.random.key(1), vocab_size=V, width=6)
    return score_rollout(
        actor,
        None,
        reference,
        jnp.sum(jnp.where(rollout.sequence_mask, rollout.tokens, 0), 1) / V,
        rollout,
        token_logprobs_fn=token_logprobs,
        values_fn=None,
        temperature=TEMPERATURE,
    )


@pytest.fixture(scope="module")
def grouped(scored):
    """Experience as if the actor had moved since, with a KL term in the loss."""
    experience, _ = make_group_experience(
        scored,
        group_size=4,
        kl_coef=0.05,
        kl=LOSS_KL,
        groups=GroupOptions(scale="none"),
    )
    noise = np.random.default_rng(1).normal(0, 0.5, (B, T))
    moved = experience.old_logprobs + jnp.asarray(noise, jnp.float32)
    return dataclasses.replace(experience, old_logprobs=moved)


def host(tree):
    """Copies that no donation takes away."""
    return jax.tree.map(np.array, tree)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want):
    jax.tree.map(close, got, want)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


def gradients(objective, params, experience):
    fn = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return fn(params, experience, count_experience(experience))


# ---- scoring without a critic ----


def test_scored_without_a_critic(scored, rollout, actor):
    assert scored.values is None and scored.end_values is None
    assert scored.target_values is None
    want, _ = token_logprobs(
        actor,
        rollout.tokens,
        rollout.sequence_mask,
        response_length=T,
        temperature=TEMPERATURE,
    )
    close(np.where(rollout.mask, scored.logprobs - want, 0.0), 0.0)


def test_an_experience_without_values_has_no_critic_loss(grouped):
    with pytest.raises(ValueError, match=r"^the experience has no old_values[^\n]+$"):
        critic_loss(jnp.zeros((B, T)), grouped)


# ---- the objective ----


def test_it_is_the_actors_half_of_ppo(actor, grouped):
    _, critic = context_params(jax.random.key(2), vocab_size=V, width=6)
    zeros = jnp.zeros((B, T))
    with_critic = dataclasses.replace(grouped, old_values=zeros, returns=zeros + 1)
    options = PolicyLossOptions(entropy_coef=0.01, clip_eps=0.1, clip_eps_high=0.3)
    ppo = ppo_objective(
        separate_networks(
            token_logprobs_fn=token_logprobs,
            values_fn=values_from_sequence(context_values),
        ),
        temperature=TEMPERATURE,
        policy_loss=options,
        kl=LOSS_KL,
    )
    (_, ppo_metrics), want = gradients(
        ppo, ActorCritic(actor=actor, critic=critic), with_critic
    )
    (_, metrics), got = gradients(
        objective_with(options), ActorCritic(actor=actor, critic={}), grouped
    )
    assert_close(got.actor, want.actor)
    assert got.critic == {}
    assert jnp.abs(got.actor["kernel"]).max() > 1e-3
    of_critics = {name for name in ppo_metrics if name.startswith("value/")}
    assert metrics.keys() == ppo_metrics.keys() - of_critics
    for name, value in metrics.items():
        close(value, ppo_metrics[name], err_msg=name)
    assert metrics["policy/kl_loss"] > 0 and metrics["policy/clip_fraction"] > 0


def tabular(params, tokens, mask, /, *, response_length, temperature):
    """The parameters are the log-probabilities."""
    return params, jnp.ones_like(params)


def by_table(experience, kl=LOSS_KL, **options):
    """The log-probabilities, the metrics and the gradient in them."""
    objective = critic_free_objective(tabular, kl=kl, **options)
    table = np.random.default_rng(2).normal(-2, 0.5, (B, T)).astype(np.float32)
    params = ActorCritic(actor=jnp.asarray(table), critic={})
    (_, metrics), grads = gradients(objective, params, experience)
    return params.actor, metrics, grads.actor


def test_options_other_than_those_of_the_experience(grouped):
    with pytest.raises(ValueError, match=r"^kl.place='none': give the objective"):
        by_table(grouped, kl=KLOptions(place="none"))
    correction = PolicyLossOptions(sampler_correction="truncate")
    with pytest.raises(ValueError, match=r"^sampler_correction='truncate': give"):
        by_table(grouped, policy_loss=correction)


@pytest.mark.parametrize(
    "options",
    [
        PolicyLossOptions(),
        PolicyLossOptions(surrogate="gspo", aggregation="seq-mean-token-mean"),
    ],
    ids=["tokens", "sequences"],
)
def test_microbatches_change_no_gradient(actor, grouped, options):
    params = ActorCritic(actor=actor, critic={})

    @partial(jax.jit, static_argnums=1)
    def whole(experience, num_microbatches):
        return accumulate_gradients(
            objective_with(options),
            params,
            experience,
            count_experience(experience),
            num_microbatches=num_microbatches,
        )

    loss, metrics, grads = whole(grouped, 1)
    for parts in (2, 8):
        got_loss, got_metrics, got = whole(grouped, parts)
        assert_close((got_loss, got_metrics, got), (loss, metrics, grads))


# ---- the update ----


def state_of(actor, **options):
    # A copy: the update donates its state.
    params = ActorCritic(actor=jax.tree.map(jnp.copy, actor), critic={})
    return init_train_state(jax.random.key(3), params, adam, kl_coef=0.05, **options)


@pytest.fixture(scope="module")
def update():
    """Two epochs of two minibatches; the policy that answers is every third one."""
    return make_update(
        objective_with(), adam, num_epochs=2, num_minibatches=2, refresh_every=3
    )


def test_an_update_without_a_critic(update, actor, grouped):
    state, metrics = update(state_of(actor), grouped)
    assert state.step == 1
    assert state.params.critic == {} and state.old_policy is None
    assert int(optax.tree.get(state.opt_state.actor, "count")) == 4
    assert differ(state.params.actor, actor)
    assert not [name for name in metrics if "critic" in name or "value" in name]
    assert metrics["optim/actor_grad_norm"] > 0
    assert first_nonfinite(metrics)["policy_loss"] == -1
    assert {"policy/loss", "policy/kl_loss", "policy/first_approx_kl"} < metrics.keys()


def test_the_old_policy_is_refreshed_at_every_third_update(update, actor, grouped):
    state = state_of(actor, old_policy=True)
    first = held = host(state.old_policy)
    assert_equal(first, host(actor))
    for done in range(1, 8):
        state, _ = update(state, grouped)
        assert differ(state.params.actor, held)
        if done in (3, 6):
            held = host(state.params.actor)
        assert_equal(host(state.old_policy), held)
    assert differ(held, first)
    # Keeping a copy changes nothing of what is learned.
    alone, _ = update(state_of(actor), grouped)
    beside, _ = update(state_of(actor, old_policy=True), grouped)
    assert_close(host(beside.params), host(alone.params))


def test_what_is_not_finite_is_not_learned(update, actor, grouped):
    row = int(np.flatnonzero(np.asarray(grouped.mask[:, 0]))[0])
    bad = dataclasses.replace(
        grouped, advantages=grouped.advantages.at[row, 0].set(jnp.nan)
    )
    state = state_of(actor, old_policy=True)
    state = dataclasses.replace(state, step=jnp.asarray(2, jnp.int32))  # one is due
    before = host(state.old_policy)
    state, metrics = update(state, bad)
    assert state.step == 2
    first = first_nonfinite(metrics)["policy_loss"]
    assert first == first_nonfinite(metrics)["actor_gradient"] >= 0
    assert first < 2  # every row comes in the first epoch
    assert int(optax.tree.get(state.opt_state.actor, "count")) == 0
    assert_equal(host(state.old_policy), before)
    assert_equal(host(state.params.actor), host(actor))
    state, metrics = update(state, grouped)
    assert state.step == 3
    assert_equal(host(state.old_policy), host(state.params.actor))


def test_an_update_stops_early(actor, grouped):
    limited = make_update(
        objective_with(), adam, num_epochs=2, num_minibatches=2, max_kl=1e-6
    )
    state, metrics = limited(state_of(actor), grouped)
    assert metrics["policy/steps"] == 0 and state.step == 1
    assert_equal(host(state.params.actor), host(actor))
