"""Device meshes, and batches sharded over them."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.interfaces import BATCH_AXES

Tree = TypeVar("Tree")


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first `data · fsdp · tensor` devices, with these axis names.

    Axes are `Auto`: shardings propagate through any model without annotations.

    Raises:
        ValueError: there are fewer devices.
    """
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    needed = data * fsdp * tensor
    devices = jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"mesh.data={data} × mesh.fsdp={fsdp} × tensor={tensor} needs {needed} "
            f"devices; this machine has {len(devices)}"
        )
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=devices[:needed],
    )


def put_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Shards host arrays with a common leading axis over the mesh's batch axes."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def map_batches(
    fn: Callable[[int, Any], Any], rows: Any, *, batch_size: int, mesh: Mesh
) -> Any:
    """Applies `fn` to batches of rows and concatenates the results.

    The last batch is padded with its last row to avoid recompilation; results for the
    padding are removed.

    Args:
        fn: maps the number of a batch and a pytree with leading axis `batch_size` to a
            pytree with that leading axis.
        rows: pytree of host arrays with a common leading axis N, at least 1.
        batch_size: a multiple of the mesh's batch shards.
        mesh: device mesh.

    Returns:
        Host arrays with leading axis N.
    """
    count = len(jax.tree.leaves(rows)[0])
    parts = []
    for number, start in enumerate(range(0, count, batch_size)):
        index = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = put_batch(mesh, jax.tree.map(lambda x, i=index: x[i], rows))
        parts.append(jax.device_get(fn(number, batch)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
