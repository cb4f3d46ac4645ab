"""`update.py`: what overflows and does not matter, and what does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algo.options import PolicyLossOptions
from rlhf_jax.algo.types import Experience
from rlhf_jax.learner import (
    ActorCritic,
    critic_free_objective,
    init_train_state,
    make_update,
)
from rlhf_jax.learner.finite import NonFiniteError, first_nonfinite, pop_nonfinite

ROWS, WIDTH = 4, 3
RATE = 0.125
FAR = 118.0
"""log ρ of one token: e^118 is 1.8e51, and float32 ends at 3.4e38."""
SGD = ActorCritic(actor=optax.sgd(RATE), critic=optax.identity())


def table_logprobs(table, tokens, mask, /, *, response_length, temperature):
    """A policy whose parameters are the log-probabilities themselves, by row."""
    return table[tokens[:, 0]], jnp.zeros((len(tokens), response_length))


def make_experience(advantages, old_logprobs):
    """Row i of the table answers in row i."""
    real = jnp.ones((ROWS, WIDTH), bool)
    return Experience(
        tokens=jnp.tile(jnp.arange(ROWS)[:, None], (1, WIDTH)),
        sequence_mask=real,
        mask=real,
        old_logprobs=jnp.asarray(old_logprobs, jnp.float32),
        ref_logprobs=jnp.zeros((ROWS, WIDTH)),
        old_values=None,
        advantages=jnp.asarray(advantages, jnp.float32),
        returns=None,
    )


@pytest.fixture
def one_far_token():
    """Of the policy of zeros: ρ = 1 everywhere, but for one token of row 2."""
    old = np.zeros((ROWS, WIDTH))
    old[2, 1] = -FAR
    advantages = np.ones((ROWS, WIDTH))
    advantages[2] = -1.0
    return make_experience(advantages, old)


def run(objective, experience, **options):
    options = {"num_epochs": 1, "num_minibatches": 1} | options
    params = ActorCritic(actor=jnp.zeros((ROWS, WIDTH)), critic={})
    state = init_train_state(jax.random.key(0), params, SGD, kl_coef=0.0)
    return make_update(objective, SGD, **options)(state, experience)


SURROGATES = {
    # −A · min(ρ, 2) · log π as a constant: the slope is −A · min(ρ, 2) / N.
    "cispo": ({"surrogate": "cispo", "ratio_bound": 2.0}, 2.0),
    # Beyond the clamp nothing has a slope.
    "verl": ({"log_ratio_clamp": 20.0, "dual_clip": 3.0}, 0.0),
    "openrlhf": ({"log_ratio_clamp": 20.0}, 0.0),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_a_ratio_that_overflows_vetoes_no_step(one_far_token, name):
    options, far_slope = SURROGATES[name]
    objective = critic_free_objective(
        table_logprobs, policy_loss=PolicyLossOptions(**options)
    )
    state, metrics = run(objective, one_far_token)
    assert state.step == 1
    assert metrics["policy/ratio_mean"] == np.inf
    assert np.isfinite(metrics["policy/loss"])
    # A descent of RATE · A · ρ / 12 by every token; ρ = 1 but for the far one.
    want = np.full((ROWS, WIDTH), RATE / 12)
    want[2] = [-RATE / 12, -RATE * far_slope / 12, -RATE / 12]
    np.testing.assert_allclose(state.params.actor, want, rtol=1e-5, atol=1e-6)
    # Reported as it is, and no error.
    left = pop_nonfinite(jax.device_get(metrics), step=1)
    assert left["policy/ratio_mean"] == np.inf


def hand_built(**metrics):
    """Loss Σ params · advantages / ROWS, with these metrics beside it."""

    def objective(params, rows, _):
        loss = jnp.sum(params.actor[rows.tokens[:, 0]] * rows.advantages) / ROWS
        usual = {"policy/loss": 0.0, "policy/approx_kl": 0.0}
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        return loss, {k: jnp.float32(v) for k, v in (usual | named).items()}

    return objective


@pytest.fixture
def plain():
    return make_experience(np.ones((ROWS, WIDTH)), np.zeros((ROWS, WIDTH)))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("name", "is_term"),
    [
        ("policy/loss", True),
        ("policy/kl_loss", True),
        ("value/loss", True),
        ("policy/ratio_mean", False),
        ("policy/approx_kl", False),
        ("policy/entropy", False),
        ("policy/loss_scale", False),
    ],
)
def test_names_that_end_in_loss_are_terms_and_no_others(plain, name, is_term, value):
    objective = hand_built(**{name.replace("/", "__"): value})
    state, metrics = run(objective, plain)
    assert state.step == (0 if is_term else 1)
    step = 0.0 if is_term else -RATE / ROWS
    np.testing.assert_allclose(state.params.actor, np.full((ROWS, WIDTH), step))
    np.testing.assert_equal(np.float32(metrics[name]), np.float32(value))
    if is_term:
        term = name.replace("/", "_")
        with pytest.raises(NonFiniteError, match=f"step 3: {term} is not finite"):
            pop_nonfinite(jax.device_get(metrics), step=3)
    else:
        assert set(first_nonfinite(metrics).values()) == {-1}


def test_a_gradient_that_overflows_is_no_step(plain):
    # The loss is 0 at parameters of 0; its gradient is 3e38 / 4, whose square is inf.
    steep = dataclasses.replace(plain, advantages=3e38 * plain.advantages)
    state, metrics = run(hand_built(), steep)
    assert state.step == 0
    np.testing.assert_array_equal(state.params.actor, np.zeros((ROWS, WIDTH)))
    assert first_nonfinite(metrics)["actor_gradient"] == 0
    assert first_nonfinite(metrics)["total_loss"] == -1


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_kl_that_is_no_number_stops_the_update_early(plain, value):
    objective = hand_built(policy__approx_kl=value)
    state, metrics = run(objective, plain, max_kl=0.1, num_epochs=2, num_minibatches=2)
    # As any KL above the limit: no step, and the update itself was sound.
    assert metrics["policy/steps"] == 0
    assert state.step == 1
    np.testing.assert_array_equal(state.params.actor, np.zeros((ROWS, WIDTH)))
    for name in ("policy/approx_kl", "policy/first_approx_kl"):
        np.testing.assert_equal(np.float32(metrics[name]), np.float32(value))
    pop_nonfinite(jax.device_get(metrics), step=1)  # raises nothing
    # A loss that is NaN is an error all the same: no later rollout would mend it.
    objective = hand_built(policy__approx_kl=value, policy__loss=np.nan)
    state, metrics = run(objective, plain, max_kl=0.1)
    assert state.step == 0
    with pytest.raises(NonFiniteError, match="policy_loss"):
        pop_nonfinite(jax.device_get(metrics), step=1)
