"""Models, states and batches of a run as shapes with shardings, without values."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.run import RunConfig
from rlhf_jax.interfaces import BATCH_AXES
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.heads import with_head
from rlhf_jax.models.hf.checkpoint import Checkpoint
from rlhf_jax.models.hf.tensor_layout import parameter_shapes
from rlhf_jax.models.quantize import quantize_kernels
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.networks import Networks, State, configured
from rlhf_jax.recipes.policy_models import PolicyModels


def place(tree: Any, mesh: Mesh) -> Any:
    """Shapes with a run's shardings of parameters and states."""
    return with_shardings(tree, parameter_sharding(mesh, tree))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings of a batch."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return with_shardings(tree, jax.tree.map(lambda _: rows, tree))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        tree,
        shardings,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of sharded shapes per device; the same on all."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def tokens(*shape: int) -> Any:
    """Token ids."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def flags(*shape: int) -> Any:
    """A mask."""
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


class AbstractNetworks(Networks):
    """The networks of a run as shapes; reads no files and computes nothing.

    Args:
        config: configuration of the run.
        shape: shape of every model.
        mesh: device mesh of the parameters.
    """

    def __init__(self, config: RunConfig, shape: DecoderConfig, mesh: Mesh):
        super().__init__(config, mesh)
        self._shape = shape

    def make(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """The shapes of a function's result."""
        return place(jax.eval_shape(function, *arrays), self.mesh)

    def place(self, state: State) -> tuple[State, State]:
        """A state with shardings, and the shardings."""
        placed = place(state, self.mesh)
        return placed, jax.tree.map(lambda leaf: leaf.sharding, placed)

    def _open(self, path: str) -> Checkpoint:
        return Checkpoint(path=path, directory=Path(path))

    def _with_head(
        self, module: Transformer, params: Params, head: Head, *, key: Array | None
    ) -> tuple[Transformer, Params]:
        if head != "lm" and "score" not in params:  # would be initialized
            params = params | {"score": params["final_norm"]["scale"]}
        return with_head(module, params, head, key=key)

    def _load(
        self,
        checkpoint: Checkpoint,
        head: Head,
        *,
        stored: str,
        key: Array | None,
    ) -> tuple[Transformer, Params]:
        dtype = jnp.dtype(self.config.dtype if stored == "int8" else stored)
        module = Transformer(self._shape, head=head, param_dtype=dtype)
        params = unflatten_dict(parameter_shapes(module), sep="/")
        if stored == "int8":
            params = jax.eval_shape(quantize_kernels, params)
        return configured(module, self.config), place(params, self.mesh)


def cache_bytes(
    models: PolicyModels, actor: Params, prompts: Any, cache_length: int, mesh: Mesh
) -> int:
    """Bytes of the KV cache per device, with rows sharded like a batch."""

    def prefill(params: Params, ids: Array, mask: Array) -> Any:
        _, cache = models.policy.prefill(params, ids, mask, cache_length=cache_length)
        return cache.keys, cache.values

    shape = prompts.tokens.shape
    cache = jax.eval_shape(prefill, actor, tokens(*shape), flags(*shape))
    return bytes_per_device(spread(cache, mesh))
