"""`gradients.py`: what is summed over microbatches, and in which precision."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.learner.gradients import accumulate_gradients, apply_gradients


def weighted(params, batch, divisor):
    """A loss whose gradient is the sum of the batch over the divisor."""
    loss = jnp.sum(params.astype(jnp.float32) * batch["x"]) / divisor
    return loss, {"rows": jnp.sum(jnp.ones_like(batch["x"])) / divisor}


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_sums_are_those_of_the_whole_batch(maybe_jit, num_microbatches):
    def run(params, batch):
        return accumulate_gradients(
            weighted,
            params,
            batch,
            jnp.float32(4),
            num_microbatches=num_microbatches,
        )

    loss, metrics, grads = maybe_jit(run)(
        jnp.float32(0.5), {"x": jnp.array([1.5, -0.25, 3.0, 0.75])}
    )
    # Σ x = 5: loss .5·5/4, gradient 5/4.
    assert (loss, grads, metrics["rows"]) == (0.625, 1.25, 1.0)


def test_gradients_of_half_precision_parameters_are_summed_in_float32():
    # In bfloat16, 256 + 1 is 256: the sum would end at 258. 260 it can hold.
    _, _, grads = accumulate_gradients(
        weighted,
        jnp.bfloat16(0.5),
        {"x": jnp.array([256.0, 1.0, 1.0, 2.0])},
        jnp.float32(1),
        num_microbatches=4,
    )
    assert grads.dtype == jnp.bfloat16
    assert grads == 260


@pytest.mark.parametrize("accept", [True, False])
def test_a_step_is_taken_whole_or_not_at_all(accept):
    optimizer = optax.adam(0.1)
    params = jnp.array([0.5, np.nan])
    state = optimizer.init(params)
    stepped, stepped_state = apply_gradients(
        optimizer, jnp.array([1.0, np.nan]), state, params, accept=jnp.asarray(accept)
    )
    np.testing.assert_allclose(stepped[0], 0.4 if accept else 0.5, rtol=1e-5)
    assert stepped_state[0].count == int(accept)
    assert np.isfinite(stepped_state[0].mu).all() == (not accept)
