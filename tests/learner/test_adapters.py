"""Training part of a network: what is frozen is an argument, and stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.learner import init_model_state, make_optimizer, make_supervised_step
from rlhf_jax.learner.gradients import accumulate_gradients

TRACED = []


def squares(params, batch, divisor):
    """Half the mean squared error of w + b; its gradient is the mean error."""
    TRACED.append(1)
    error = params["w"] + params["b"] - batch
    loss = 0.5 * jnp.sum(error**2) / divisor
    return loss, {"loss": loss}


def join(trained, frozen, key=None):
    noise = 0.0 if key is None else jax.random.normal(key) * frozen["noise"]
    return {"w": frozen["w"], "b": trained["b"] + noise}


def step_of(**options):
    optimizer = optax.sgd(0.5)
    step = make_supervised_step(
        squares,
        optimizer,
        count=lambda batch: jnp.asarray(len(batch), jnp.float32),
        assemble=join,
        **options,
    )
    return step, init_model_state(
        jax.random.key(3), {"b": jnp.float32(0.25)}, optimizer
    )


def test_one_step_by_hand():
    step, state = step_of()
    frozen = {"w": jnp.array(1.0), "noise": jnp.array(0.0)}
    state, metrics = step(state, jnp.array([2.0, 4.0]), frozen)
    # Errors 1.25 − 2 and 1.25 − 4 have the mean −1.75; half of it is added to b.
    np.testing.assert_allclose(state.params["b"], 1.125, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (0.75**2 + 2.75**2) / 4, rtol=1e-6)
    assert frozen["w"] == 1.0  # not donated: it can be read
    assert set(state.params) == {"b"}


def test_another_base_does_not_compile_again():
    step, state = step_of()
    traced = []
    for w in (1.0, 2.0, 3.0):
        frozen = {"w": jnp.array(w), "noise": jnp.array(0.0)}
        state, _ = step(state, jnp.array([2.0, 4.0]), frozen)
        traced.append(len(TRACED))
    assert traced[0] == traced[1] == traced[2]
    # b goes half of the way to 3 − w each time: ¼, 1⅛, 1 1/16, then 17/32.
    np.testing.assert_allclose(state.params["b"], 0.53125, rtol=1e-6)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_noise_differs_between_steps_and_microbatches(num_microbatches):
    step, state = step_of(num_microbatches=num_microbatches)
    batch = jnp.zeros(4)
    frozen = {"w": jnp.array(0.0), "noise": jnp.array(1.0)}
    seen = []
    for _ in range(3):
        before = float(state.params["b"])
        state, _ = step(state, batch, frozen)
        seen.append((float(state.params["b"]) - 0.5 * before) * -2)  # mean noise
    assert len({round(x, 5) for x in seen}) == 3
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), num_microbatches)
    want = np.mean([float(jax.random.normal(key)) for key in keys])
    np.testing.assert_allclose(seen[0], want, rtol=1e-5)


def test_each_microbatch_has_a_key():
    def objective(params, batch, divisor, key):
        return params * jax.random.uniform(key) * jnp.sum(batch), {}

    _, _, one = accumulate_gradients(
        objective,
        jnp.float32(1.0),
        jnp.array([1.0, 0.0]),
        None,
        num_microbatches=2,
        key=jax.random.key(0),
    )
    _, _, other = accumulate_gradients(
        objective,
        jnp.float32(1.0),
        jnp.array([0.0, 1.0]),
        None,
        num_microbatches=2,
        key=jax.random.key(0),
    )
    assert one != other and 0 < one < 1 and 0 < other < 1


def test_adapters_decay_like_matrices():
    optimizer = make_optimizer(0.1, weight_decay=0.5, max_grad_norm=None)
    params = {"lora_a": jnp.ones((2, 3)), "lora_b": jnp.ones(2), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["lora_a"], np.full((2, 3), -0.05), rtol=1e-6)
    np.testing.assert_allclose(updates["lora_b"], np.full(2, -0.05), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))
