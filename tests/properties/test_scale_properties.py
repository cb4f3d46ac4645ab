"""One minibatch, read in microbatches or by several devices, gives one result."""

from functools import partial
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from properties.pure_functions import experience_of
from properties.strategies import CHECK, TOLERANCE, B, batches, ragged_masks

from rlhf_jax.algo import losses
from rlhf_jax.algo.masking import Aggregation, masked_whiten

MODES = get_args(Aggregation)


@partial(jax.jit, static_argnames="mode")
def loss_and_gradients(x, value_mask, counts, mode):
    """Of actor and critic, with all that an experience may carry."""
    experience = experience_of(
        x, value_mask=value_mask, weights=x["weights"], kl_coef=x["kl_coef"]
    )
    tokens, value_tokens, sequences = counts

    def loss(logprobs, entropy, values):
        actor, of_actor = losses.actor_loss(
            logprobs,
            experience,
            entropy=entropy,
            entropy_coef=0.1,
            aggregation=mode,
            num_tokens=tokens,
            num_sequences=sequences,
        )
        critic, of_critic = losses.critic_loss(
            values,
            experience,
            aggregation=mode,
            num_tokens=value_tokens,
            num_sequences=sequences,
        )
        return actor + critic, of_actor | of_critic

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        x["logprobs"], x["entropy"], x["values"]
    )


@pytest.mark.parametrize("mode", MODES)
@given(
    batch=batches(masks=ragged_masks()),
    value_mask=ragged_masks(),
    part_of=st.lists(st.integers(0, 2), min_size=B, max_size=B),
)
@CHECK
def test_microbatches_of_any_rows_add_up(mode, batch, value_mask, part_of):
    value_mask = value_mask | batch["mask"]
    counts = tuple(
        jnp.float32(n)
        for n in (
            batch["mask"].sum(),
            value_mask.sum(),
            batch["mask"].any(axis=1).sum(),
        )
    )
    whole = loss_and_gradients(batch, value_mask, counts, mode)
    parts = []
    for part in range(3):  # the other rows masked out: the shape stays
        rows = (np.array(part_of) == part)[:, None]
        microbatch = batch | {"mask": batch["mask"] & rows}
        parts.append(loss_and_gradients(microbatch, value_mask & rows, counts, mode))
    total = jax.tree.map(lambda *x: sum(np.asarray(y) for y in x), *parts)
    chex.assert_trees_all_close(total, whole, rtol=1e-5, atol=1e-5)


@jax.jit
def whitened_and_losses(x):
    counts = (None, None, None)
    return (
        masked_whiten(x["advantages"], x["mask"]),
        loss_and_gradients(x, x["mask"], counts, "token-mean"),
    )


@given(batch=batches(masks=ragged_masks()))
@CHECK
def test_four_devices_are_one(batch):
    # One row on each; a row without a token is a device without one.
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    got = whitened_and_losses(spread)
    assert len(got[0].sharding.device_set) == 4
    chex.assert_trees_all_close(got, whitened_and_losses(batch), **TOLERANCE)
