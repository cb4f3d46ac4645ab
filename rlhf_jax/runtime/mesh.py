"""Devices as a mesh, and batches spread over it."""

from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.interfaces import BATCH_AXES

Tree = TypeVar("Tree")


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The first `data · fsdp · tensor` devices, with axes of those names.

    Axes are `Auto`: shardings propagate through any model without annotations.

    Raises:
        ValueError: when there are fewer devices.
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
    """Host arrays with a common leading axis, split over the mesh's batch axes."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
