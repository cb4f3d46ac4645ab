"""`optimizer.py`: schedules by hand, AdamW against the formula and its neighbour."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.learner import make_optimizer, make_schedule


def at(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_warm_up_then_constant():
    schedule = make_schedule(
        "constant", learning_rate=0.4, total_steps=100, warmup_steps=4
    )
    np.testing.assert_allclose(
        at(schedule, [0, 1, 3, 4, 5, 100]), [0.0, 0.1, 0.3, 0.4, 0.4, 0.4], rtol=1e-6
    )


def test_warm_up_then_linear_decay():
    # From .4 at step 4 to .04 at step 10: .06 a step.
    schedule = make_schedule(
        "linear", learning_rate=0.4, total_steps=10, warmup_steps=4, end_fraction=0.1
    )
    np.testing.assert_allclose(
        at(schedule, [2, 4, 5, 7, 10, 12]),
        [0.2, 0.4, 0.34, 0.22, 0.04, 0.04],
        rtol=1e-6,
    )


def test_cosine_decay():
    # .2·.4 + .8·.4·½(1 + cos πt/8): cos(π/4) = .70710678 at step 2.
    schedule = make_schedule(
        "cosine", learning_rate=0.4, total_steps=8, end_fraction=0.2
    )
    np.testing.assert_allclose(
        at(schedule, [0, 2, 4, 8, 9]), [0.4, 0.35313708, 0.24, 0.08, 0.08], rtol=1e-6
    )


def test_warm_up_over_the_whole_run():
    schedule = make_schedule("linear", learning_rate=0.4, total_steps=4, warmup_steps=4)
    np.testing.assert_allclose(at(schedule, [0, 2, 4, 5]), [0, 0.2, 0.4, 0], atol=1e-7)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule='step'; use 'constant'"):
        make_schedule("step", learning_rate=0.1, total_steps=10)  # pyright: ignore


def updates(optimizer, params, *grads):
    state = optimizer.init(params)
    for grad in grads:
        update, state = optimizer.update(grad, state, params)
    return update


def test_first_step_is_adam_with_the_corrected_second_moment():
    # ε comparable with |g| tells the forms apart. m̂ = g, √v̂ = |g|:
    # -lr·g/(|g| + ε) = -.1·2e-5/(2e-5 + 1e-5) = -.0666…
    # TensorFlow 1 divides by √v + ε = √.001·2e-5 + 1e-5 instead: -.0595.
    optimizer = make_optimizer(0.1, max_grad_norm=None)
    update = updates(optimizer, jnp.zeros(2), jnp.array([2e-5, -2e-5]))
    np.testing.assert_allclose(update, [-0.2 / 3, 0.2 / 3], rtol=1e-5)


def test_later_steps_are_adam():
    rng = np.random.default_rng(0)
    grads = rng.normal(0, 1e-3, (4, 3))
    optimizer = make_optimizer(0.1, b1=0.8, b2=0.95, eps=1e-4, max_grad_norm=None)
    got = updates(optimizer, jnp.zeros(3), *jnp.asarray(grads, jnp.float32))
    m = v = np.zeros(3)
    for g in grads:
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * g**2
    m_hat, v_hat = m / (1 - 0.8**4), v / (1 - 0.95**4)
    want = -0.1 * m_hat / (np.sqrt(v_hat) + 1e-4)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    # Norm 5 becomes 1: .6 and .8. With ε = 1 Adam's first step shows the size of g.
    optimizer = make_optimizer(0.1, eps=1.0)
    grad = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    update = updates(optimizer, grad, grad)
    np.testing.assert_allclose(update["a"], [-0.1 * 0.6 / 1.6], rtol=1e-5)
    np.testing.assert_allclose(update["b"], [[-0.1 * 0.8 / 1.8]], rtol=1e-5)
    small = {"a": jnp.array([0.3]), "b": jnp.array([[0.4]])}  # norm ½: as it is
    update = updates(optimizer, small, small)
    np.testing.assert_allclose(update["a"], [-0.1 * 0.3 / 1.3], rtol=1e-5)


def test_weight_decay_is_for_matrices():
    ones = lambda *shape: jnp.ones(shape)  # noqa: E731
    params = {
        "token_embedding": ones(5, 3),
        "output_embedding": ones(3, 5),
        "layers": {
            "query": {"kernel": ones(2, 3, 3), "bias": ones(2, 3)},
            "mlp_norm": {"scale": ones(2, 3), "bias": ones(2, 3)},
        },
        "score": ones(3),
    }
    optimizer = make_optimizer(0.1, weight_decay=0.5)
    zero = optax.tree.zeros_like(params)
    update = updates(optimizer, params, zero)
    decayed = {
        "token_embedding": True,
        "output_embedding": True,
        "layers": {
            "query": {"kernel": True, "bias": False},
            "mlp_norm": {"scale": False, "bias": False},
        },
        "score": False,
    }
    jax.tree.map(
        lambda leaf, decays: np.testing.assert_allclose(
            leaf, np.full(leaf.shape, -0.1 * 0.5 if decays else 0.0), rtol=1e-6
        ),
        update,
        decayed,
    )


def test_the_rate_follows_the_schedule_by_optimizer_step():
    schedule = make_schedule("linear", learning_rate=0.4, total_steps=4, warmup_steps=2)
    optimizer = make_optimizer(schedule, eps=1e-12, max_grad_norm=None)
    state = optimizer.init(jnp.zeros(1))
    sizes = []
    for _ in range(4):
        update, state = optimizer.update(jnp.array([0.5]), state, jnp.zeros(1))
        sizes.append(float(-update[0]))
    # Equal gradients: m̂/√v̂ = 1, so each update is the learning rate. 1 - β₂^t has
    # an error of 2e-5 in float32.
    np.testing.assert_allclose(sizes, [0.0, 0.2, 0.4, 0.2], rtol=1e-4)
