"""`supervised.py`: one step of imitation, one of preferences, and both to the end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bare_models import bigram_logits, context_logits, context_params

from rlhf_jax.algo.types import Demonstrations, Preferences, Sequences
from rlhf_jax.learner import (
    imitation_objective,
    init_model_state,
    make_optimizer,
    make_supervised_step,
    preference_objective,
)
from rlhf_jax.learner.finite import NonFiniteError, pop_nonfinite
from rlhf_jax.learner.imitation import count_targets
from rlhf_jax.learner.preference import count_pairs
from rlhf_jax.rollout import token_logprobs_from_logits

V = 8


def state_of(params, optimizer, seed=0):
    return init_model_state(
        jax.random.key(seed), jax.tree.map(jnp.copy, params), optimizer
    )


def demonstrations(seed=0, batch=8, width=6):
    """Right-padded; the first half of each text is prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, batch)[:, None]
    columns = np.arange(width)[None, :]
    return Demonstrations(
        tokens=jnp.asarray(rng.integers(0, V, (batch, width)), jnp.int32),
        mask=jnp.asarray(columns < lengths),
        target_mask=jnp.asarray((columns < lengths) & (columns >= lengths // 2)),
    )


imitate = imitation_objective(token_logprobs_from_logits(context_logits))


@pytest.fixture
def params():
    return context_params(jax.random.key(0), vocab_size=V, width=4)[0]


def test_one_step_by_hand():
    # From a table of zeros every token costs log 4. Plain gradient descent with rate
    # .8 on the mean over both targets: row 1 moves by -.8·(¼ - 1_2)/2, row 2 by
    # -.8·(¼ - 1_3)/2.
    optimizer = optax.sgd(0.8)
    step = make_supervised_step(
        imitation_objective(token_logprobs_from_logits(bigram_logits)),
        optimizer,
        count=count_targets,
    )
    batch = Demonstrations(
        tokens=jnp.array([[0, 1, 2, 3]]),
        mask=jnp.ones((1, 4), bool),
        target_mask=jnp.array([[True, False, True, True]]),  # nothing predicts column 0
    )
    state, metrics = step(state_of(jnp.zeros((4, 4)), optimizer), batch)
    np.testing.assert_allclose(metrics["loss"], np.log(4), rtol=1e-6)
    want = np.zeros((4, 4))
    want[1] = [-0.1, -0.1, 0.3, -0.1]
    want[2] = [-0.1, -0.1, -0.1, 0.3]
    np.testing.assert_allclose(state.params, want, rtol=1e-5, atol=1e-7)
    # ‖gradient‖ = √(2·(3·⅛² + ⅜²))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(0.375), rtol=1e-5)
    assert state.step == 1


def test_microbatches_of_unequal_target_counts_change_nothing(params):
    optimizer, batch = optax.sgd(0.5), demonstrations()
    counts = np.asarray(batch.target_mask[:, 1:]).reshape(-1, 4).sum(axis=0)
    assert len(set(counts)) > 1
    results = [
        make_supervised_step(
            imitate, optimizer, count=count_targets, num_microbatches=n
        )(state_of(params, optimizer), batch)
        for n in (1, 4)
    ]
    (whole, whole_metrics), (parts, parts_metrics) = results
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (parts.params, parts_metrics),
        (whole.params, whole_metrics),
    )


def test_a_batch_without_targets_is_no_step_into_the_void(params):
    optimizer = optax.sgd(0.5)
    batch = demonstrations()
    batch = Demonstrations(
        tokens=batch.tokens, mask=batch.mask, target_mask=jnp.zeros_like(batch.mask)
    )
    step = make_supervised_step(imitate, optimizer, count=count_targets)
    state, metrics = step(state_of(params, optimizer), batch)
    assert metrics["loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_imitation_learns(params):
    optimizer = make_optimizer(0.1)
    step = make_supervised_step(imitate, optimizer, count=count_targets)
    tokens = (jnp.arange(4)[:, None] + jnp.arange(6)[None, :]) % V  # counting
    mask = jnp.ones_like(tokens, bool)
    batch = Demonstrations(tokens=tokens, mask=mask, target_mask=mask)
    state = state_of(params, optimizer)
    old = jax.tree.leaves((state.params, state.opt_state))
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert all(leaf.is_deleted() for leaf in old)
    assert losses[0] > 1.5 and losses[-1] < 0.1
    assert state.step == 60


def preferences(chosen, rejected):
    """Texts of two tokens."""
    as_sequences = lambda x: Sequences(  # noqa: E731
        tokens=jnp.asarray(x, jnp.int32), mask=jnp.ones((len(x), 2), bool)
    )
    return Preferences(chosen=as_sequences(chosen), rejected=as_sequences(rejected))


def mean_weight(weights, tokens, mask):
    return jnp.mean(weights[tokens], axis=1)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_one_step_on_preferences_by_hand(num_microbatches):
    # All scores 0: every pair costs log 2, and ∂L/∂gap = -½. Over 2 pairs with rate 4:
    # each chosen score rises along +1, each rejected one falls; tokens weigh ½.
    optimizer = optax.sgd(4.0)
    step = make_supervised_step(
        preference_objective(mean_weight),
        optimizer,
        count=count_pairs,
        num_microbatches=num_microbatches,
    )
    batch = preferences(chosen=[[0, 1], [1, 1]], rejected=[[2, 0], [3, 2]])
    state, metrics = step(state_of(jnp.zeros(V), optimizer), batch)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert metrics["accuracy"] == 0  # ties
    # Net counts in chosen - rejected: 0: 0, 1: +3, 2: -2, 3: -1; times 4·½·½/2.
    np.testing.assert_allclose(
        state.params, [0, 1.5, -1.0, -0.5, 0, 0, 0, 0], rtol=1e-6
    )
    _, metrics = step(state, batch)
    assert metrics["accuracy"] == 1
    # Scores: chosen .75 and 1.5, rejected -.5 and -.75.
    np.testing.assert_allclose(metrics["margin"], (1.25 + 2.25) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["score_mean"], 1.0 / 4, rtol=1e-6)


def test_what_is_not_finite_is_no_step():
    optimizer = make_optimizer(0.1)
    step = make_supervised_step(
        preference_objective(mean_weight), optimizer, count=count_pairs
    )
    batch = preferences(chosen=[[0, 1]], rejected=[[2, 3]])
    weights = jnp.arange(V, dtype=jnp.float32).at[3].set(jnp.inf)
    state, metrics = step(state_of(weights, optimizer), batch)
    np.testing.assert_array_equal(state.params, weights)
    assert state.step == 0
    assert optax.tree.get(state.opt_state, "count") == 0
    with pytest.raises(NonFiniteError, match=r"step 4: loss .*optimizer step 0"):
        pop_nonfinite(jax.device_get(metrics), step=4)
    # From a finite state the same program goes on.
    state, metrics = step(state_of(jnp.zeros(V), optimizer), batch)
    assert state.step == 1
    assert "loss" in pop_nonfinite(jax.device_get(metrics), step=4)


def test_only_targets_and_what_is_before_them_count(params):
    step = partial(imitate, params)
    batch = demonstrations()
    dirty = Demonstrations(
        tokens=jnp.where(batch.mask, batch.tokens, V - 1),
        mask=batch.mask,
        target_mask=batch.target_mask,
    )
    want, got = (jax.jit(step)(x, jnp.float32(5))[0] for x in (batch, dirty))
    np.testing.assert_array_equal(got, want)
