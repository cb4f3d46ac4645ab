"""Parameters in bfloat16: the states that come out have the dtypes that went in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.types import Experience
from rlhf_jax.learner import (
    ActorCritic,
    init_model_state,
    init_train_state,
    make_optimizer,
    make_supervised_step,
    make_update,
)

WIDTH, ROWS = 3, 8
FORMS = ["torch", "tf1"]
MICROBATCHES = [1, 2, 4]
ROUNDING = 2.0**-8  # bfloat16 keeps 8 bits
WEIGHTS = np.linspace(0.5, 2.0, ROWS * WIDTH).reshape(ROWS, WIDTH)
"""Loss per unit of each parameter, by row. All positive, so that no gradient is near 0:
there Adam would make whole steps of rounding."""


def half(seed):
    """A matrix and a scale, as a model of two dtypes would have them."""
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.uniform(1, 2, WIDTH), jnp.bfloat16),
        "norm": jnp.asarray(1.5, jnp.float32),
    }


def linear(params, rows):
    """Its gradient in the kernel is norm · Σ rows, that in the norm kernel · Σ rows."""
    return jnp.sum(rows @ params["kernel"].astype(jnp.float32)) * params["norm"]


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def assert_close_in_bfloat16(got, want):
    # Second moments square the gradients, and a square has twice their rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=4 * ROUNDING
        ),
        got,
        want,
    )


def supervised(form, num_microbatches):
    optimizer = make_optimizer(0.125, form=form, weight_decay=0.01)
    step = make_supervised_step(
        lambda params, rows, count: (linear(params, rows) / count, {}),
        optimizer,
        count=lambda rows: jnp.float32(len(rows)),
        num_microbatches=num_microbatches,
    )
    state = init_model_state(jax.random.key(0), half(0), optimizer)
    before = dtypes((state.params, state.opt_state))
    for _ in range(3):
        state, metrics = step(state, jnp.asarray(WEIGHTS, jnp.float32))
    assert dtypes((state.params, state.opt_state)) == before
    assert state.step == 3
    return state, metrics


def ppo_like(form, num_microbatches):
    def objective(params, rows, _):
        loss = linear(params.actor, rows.advantages) - linear(
            params.critic, rows.advantages
        )
        names = ("policy/loss", "policy/approx_kl", "value/loss")
        return loss / ROWS, dict.fromkeys(names, jnp.float32(0))

    weights = jnp.asarray(WEIGHTS, jnp.float32)
    experience = Experience(
        tokens=jnp.zeros((ROWS, WIDTH), jnp.int32),
        sequence_mask=weights > 0,
        mask=weights > 0,
        old_logprobs=weights,
        ref_logprobs=weights,
        old_values=weights,
        advantages=weights,
        returns=weights,
    )
    optimizer = make_optimizer(0.125, form=form)
    optimizers = ActorCritic(actor=optimizer, critic=optimizer)
    # Two epochs of one minibatch: the order of the rows decides nothing.
    update = make_update(
        objective,
        optimizers,
        num_epochs=2,
        num_minibatches=1,
        num_microbatches=num_microbatches,
    )
    params = ActorCritic(actor=half(0), critic=half(1))
    state = init_train_state(jax.random.key(0), params, optimizers, kl_coef=0.0)
    before = dtypes((state.params, state.opt_state))
    state, metrics = update(state, experience)
    assert dtypes((state.params, state.opt_state)) == before
    assert state.step == 1
    return state, metrics


@pytest.mark.parametrize("num_microbatches", MICROBATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [supervised, ppo_like])
def test_microbatches_change_no_dtype_and_results_by_rounding_only(
    train, form, num_microbatches
):
    state, metrics = train(form, num_microbatches)
    whole, whole_metrics = train(form, 1)
    assert_close_in_bfloat16(
        (state.params, state.opt_state, metrics),
        (whole.params, whole.opt_state, whole_metrics),
    )


@pytest.mark.parametrize("form", FORMS)
def test_moments_of_half_precision_parameters_are_in_half_precision(form):
    optimizer = make_optimizer(0.125, form=form, max_grad_norm=None)
    state = optimizer.init(half(0))
    _, state = optimizer.update(half(1), state, half(0))
    for moments in (state[0].mu, state[0].nu):
        assert dtypes(moments) == {"kernel": jnp.bfloat16, "norm": jnp.float32}


@pytest.mark.parametrize("form", FORMS)
def test_the_first_step_is_the_rate_long(form):
    # Adam's first step is the rate times the sign of the gradient, whatever the number
    # of microbatches; ε is far below the gradients. 1 − 0.125 is exact in bfloat16.
    optimizer = make_optimizer(0.125, form=form, eps=1e-8, max_grad_norm=None)
    step = make_supervised_step(
        lambda params, rows, count: (jnp.sum(rows * params) / count, {}),
        optimizer,
        count=lambda rows: jnp.float32(len(rows)),
        num_microbatches=4,
    )
    params = jnp.ones((), jnp.bfloat16)
    state = init_model_state(jax.random.key(0), params, optimizer)
    state, _ = step(state, jnp.array([1.0, 2.0, 3.0, 4.0]))
    assert state.params.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(state.params), 0.875, rtol=2 * ROUNDING)
