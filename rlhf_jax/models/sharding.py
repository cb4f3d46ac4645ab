"""Sharding of parameters over a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def parameter_sharding(mesh: Mesh, shapes: Any) -> Any:
    """Fully sharded placement of parameters, or of trees with the same shapes.

    The largest dimension divisible by the size of axis `"fsdp"` is sharded over that
    axis; a leaf without such a dimension is replicated. The layer axis (axis 0 of
    leaves below a key `"layers"`) is never sharded: every device needs every layer.
    Optimizer states that mirror the parameters get the same sharding.

    Args:
        mesh: a mesh with an axis `"fsdp"`.
        shapes: a pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
        The same tree of `NamedSharding`.

    Raises:
        ValueError: if the mesh has no axis `"fsdp"`.

    References:
        Rajbhandari et al., 2020, arXiv:1910.02054 (ZeRO, stage 3).
    """
    if "fsdp" not in mesh.shape:
        raise ValueError(
            f"mesh axes are {tuple(mesh.shape)}; add an axis named 'fsdp', which may "
            "have size 1"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)), shapes
    )


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    size = mesh.shape["fsdp"]
    stacked = jax.tree_util.DictKey("layers") in path
    divisible = [i for i in range(int(stacked), len(shape)) if shape[i] % size == 0]
    if size == 1 or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*[None] * largest, "fsdp")
