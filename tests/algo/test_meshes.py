"""One device ≡ eight, on meshes with automatic and with explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.algo import masking, minibatches
from rlhf_jax.algo.advantages import gae, n_step_returns, td_errors
from rlhf_jax.algo.group_advantages import group_advantages
from rlhf_jax.algo.logprobs import fused_token_logprobs
from rlhf_jax.algo.losses import ppo_loss
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.types import Experience

B, T, D, V = 16, 6, 4, 24


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(request.param,))
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def data(rng):
    """Responses of 1 to 6 tokens. The last device holds none at all."""
    lengths = np.append(rng.integers(1, T + 1, B - 2), [0, 0])
    rewards, values, logprobs, ref_logprobs = (
        x.astype(np.float32) for x in rng.normal(size=(4, B, T))
    )
    return {
        "rewards": rewards,
        "values": values,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "scores": rng.normal(size=B).astype(np.float32),
        "mask": np.arange(T) < lengths[:, None],
    }


FUNCTIONS = {
    "gae": lambda x: gae(x["rewards"], x["values"], x["mask"]),
    "gae_associative": lambda x: gae(
        x["rewards"], x["values"], x["mask"], method="associative"
    ),
    "td_errors": lambda x: td_errors(x["rewards"], x["values"], x["mask"]),
    "n_step": lambda x: n_step_returns(x["rewards"], x["values"], x["mask"], n=2),
    "shape_rewards": lambda x: shape_rewards(
        x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], kl_coef=0.1
    ),
    "after_last_token": lambda x: shape_rewards(
        x["scores"],
        x["logprobs"],
        x["ref_logprobs"],
        x["mask"],
        kl_coef=0.1,
        score_position="after_last_token",
    ),
    "masked_whiten": lambda x: masking.masked_whiten(x["rewards"], x["mask"]),
    "group_advantages": lambda x: group_advantages(x["scores"], 2),
    "split_minibatches": lambda x: minibatches.split_minibatches(
        jax.random.key(0), x, num_minibatches=2
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_eight_devices_give_what_one_does(mesh, data, name):
    fn = FUNCTIONS[name]
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        want = jax.jit(fn)(jax.tree.map(jnp.asarray, data))
    spread = jax.device_put(data, NamedSharding(mesh, P("data")))
    got = jax.jit(fn)(spread)
    for ours, single in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, single, rtol=1e-5, atol=1e-6)
        assert len(ours.sharding.device_set) == 8
        assert not ours.is_fully_replicated


def test_minibatches_stay_spread_and_move_nothing(mesh, data):
    spread = jax.device_put(data, NamedSharding(mesh, P("data")))
    fn = jax.jit(functools.partial(minibatches.split_minibatches, num_minibatches=2))
    for x in jax.tree.leaves(fn(jax.random.key(0), spread)):
        for shard in x.addressable_shards:  # of [M, B/M, ...]: all M, one of B/M
            assert shard.data.shape[:2] == (2, 1)
    program = fn.lower(jax.random.key(0), spread).compile().as_text()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in program


def test_fused_logprobs_with_batch_and_vocabulary_spread(rng):
    mesh = jax.make_mesh(
        (4, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto)
    )
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)

    def fn(hidden, unembedding, tokens):
        def total(*weights):
            results = fused_token_logprobs(*weights, tokens, chunk_size=32)
            return jnp.sum(results[0] + 0.5 * results[1]), results

        return jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, unembedding)

    want = jax.jit(fn)(*map(jnp.asarray, (hidden, unembedding, tokens)))
    got = jax.jit(fn)(
        jax.device_put(hidden, NamedSharding(mesh, P("data"))),
        jax.device_put(unembedding, NamedSharding(mesh, P(None, "tensor"))),
        jax.device_put(tokens, NamedSharding(mesh, P("data"))),
    )
    for ours, single in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, single, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_with_an_empty_shard(mesh, data):
    spread = jax.device_put(data, NamedSharding(mesh, P("data")))

    def fn(x):
        experience = Experience(
            mask=x["mask"],
            old_logprobs=x["ref_logprobs"],
            ref_logprobs=x["ref_logprobs"],
            old_values=x["rewards"],
            advantages=x["rewards"],
            returns=x["logprobs"],
        )
        grad = jax.value_and_grad(ppo_loss, argnums=(0, 1), has_aux=True)
        return grad(x["logprobs"], x["values"], experience, entropy=x["values"])

    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        want = jax.jit(fn)(jax.tree.map(jnp.asarray, data))
    got = jax.jit(fn)(spread)
    for ours, single in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, single, rtol=1e-5, atol=1e-6)
