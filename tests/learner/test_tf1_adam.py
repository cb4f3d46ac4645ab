"""Adam as TensorFlow 1 has it, against its formula and against optax's form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.learner import make_optimizer
from rlhf_jax.learner.optimizer import scale_by_tf1_adam

CHECK = settings(max_examples=25, deadline=None, derandomize=True)
STEPS, N = 21, 6
BETAS = {"b1": 0.9, "b2": 0.999}


def tf1_adam(gradients, eps, b1=0.9, b2=0.999):
    """`tf.train.AdamOptimizer` in float64, at a learning rate of −1.

    lr_t = lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ)      θ ← θ − lr_t · m / (√v + ε)
    """
    m, v, steps = 0.0, 0.0, []
    beta1_power = beta2_power = 1.0
    for g in gradients.astype(np.float64):
        beta1_power, beta2_power = beta1_power * b1, beta2_power * b2
        m, v = m + (g - m) * (1 - b1), v + (g * g - v) * (1 - b2)
        rate = np.sqrt(1 - beta2_power) / (1 - beta1_power)
        steps.append(rate * m / (np.sqrt(v) + eps))
    return np.array(steps)


@partial(jax.jit, static_argnames=("form", "eps"))
def all_steps(gradients, form, eps):
    """`[STEPS, N]`: what each step of this optimizer would add to the parameters."""
    make = {"tf1": scale_by_tf1_adam, "optax": optax.scale_by_adam}[form]
    optimizer = make(**BETAS, eps=eps)

    def step(state, gradient):
        update, state = optimizer.update(gradient, state)
        return state, update

    return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]


@st.composite
def gradient_histories(draw, size):
    """`[STEPS, N]` float32 of about this size, and never far below it."""
    raw = draw(st.binary(min_size=STEPS * N, max_size=STEPS * N))
    steps = 2 * np.frombuffer(raw, np.uint8).astype(np.float64) - 255  # ±1 … ±255
    signs = np.sign(steps) * (0.25 + np.abs(steps) / 255)
    return np.float32(size * signs.reshape(STEPS, N))


# 1 − β₂ᵗ in float32 is wrong by 3e-5 at t = 1, where β₂ = 0.999 itself is rounded.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@given(data=st.data())
@CHECK
def test_every_step_is_the_formula(size, data):
    gradients = data.draw(gradient_histories(size))
    got = all_steps(gradients, "tf1", 1e-5)
    np.testing.assert_allclose(got, tf1_adam(gradients, 1e-5), **TOLERANCE)


@given(gradients=gradient_histories(1e-2))
@CHECK
def test_the_two_forms_are_one_as_epsilon_vanishes(gradients):
    tf1, other = (all_steps(gradients, form, 1e-12) for form in ("tf1", "optax"))
    np.testing.assert_allclose(tf1, other, **TOLERANCE)


@given(gradients=gradient_histories(1e-5))
@CHECK
def test_the_two_forms_differ_where_gradients_are_about_as_small_as_epsilon(gradients):
    tf1, other = (
        np.asarray(all_steps(gradients, form, 1e-5)) for form in ("tf1", "optax")
    )
    # The first: g / (|g| + ε/√.001) against g / (|g| + ε). With |g| from a quarter of
    # ε to 1.25 ε the one is at most .04 and the other at least .2.
    assert np.all(np.abs(tf1[0]) < 0.04) and np.all(np.abs(other[0]) > 0.19)
    # optax's form with ε̂ = ε / √(1 − β₂ᵗ) is this one, at step t.
    for t in (1, 2, STEPS):
        raised = all_steps(gradients, "optax", 1e-5 / float(np.sqrt(1 - 0.999**t)))
        np.testing.assert_allclose(tf1[t - 1], raised[t - 1], **TOLERANCE)


def test_first_step_by_hand():
    # g = 2e-5, ε = 1e-5: m = .1 g, v = .001 g², √.001 = .0316227766.
    # √.001 / .1 · .1 g / (√.001 g + ε) = 6.32455532e-7 / 1.0632455532e-5
    got = all_steps(np.full((STEPS, N), 2e-5, np.float32), "tf1", 1e-5)[0]
    np.testing.assert_allclose(got, 0.0594834697, rtol=1e-4)


def test_as_part_of_the_optimizer():
    gradients = np.float32(np.random.default_rng(0).normal(0, 1e-5, (3, 4)))
    optimizer = make_optimizer(0.1, **BETAS, eps=1e-5, form="tf1", max_grad_norm=None)
    params, state = jnp.zeros(4), optimizer.init(jnp.zeros(4))
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, params)
    want = -0.1 * tf1_adam(gradients, 1e-5)[-1]
    np.testing.assert_allclose(update, want, rtol=1e-4)
    assert optax.tree.get(state, "count") == 3


def test_trees_and_half_precision_keep_their_form():
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": [jnp.ones(())]}
    optimizer = scale_by_tf1_adam(**BETAS, eps=1e-5)
    update, state = optimizer.update(params, optimizer.init(params))
    for tree in (update, state.mu, state.nu):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="form='keras'; use 'torch' or 'tf1'"):
        make_optimizer(0.1, form="keras")  # pyright: ignore
