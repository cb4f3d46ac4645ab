"""Where each parameter lives on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def parameter_sharding(mesh: Mesh, shapes: Any) -> Any:
    """Fully sharded placement of parameters, or of anything shaped like them.

    The largest dimension that the size of axis `"fsdp"` divides is split over that
    axis; a leaf without such a dimension is copied to every device. The layer axis
    (axis 0 of leaves below a key `"layers"`) is never split: every device needs every
    layer. Optimizer states that mirror the parameters get the parameters' placement.

    Args:
        mesh: a mesh with an axis `"fsdp"`.
        shapes: a pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
        The same tree of `NamedSharding`.

    Raises:
        ValueError: the mesh has no axis `"fsdp"`.

    References:
        Rajbhandari et al., 2020, arXiv:1910.02054 (ZeRO, stage 3).
    """
    if "fsdp" not in mesh.shape:
        raise ValueError(
            f"mesh axes are {tuple(mesh.shape)}; parameters are split over an axis "
            "named 'fsdp', which may have size 1"
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
