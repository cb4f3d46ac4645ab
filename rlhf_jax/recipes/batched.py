"""A function of a fixed batch size over any number of rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.runtime.mesh import put_batch


def map_batches(
    fn: Callable[[int, Any], Any], rows: Any, *, batch_size: int, mesh: Mesh
) -> Any:
    """Applies `fn` to batches of rows and joins what comes back.

    The last batch is filled up with its last row, so that nothing is compiled twice;
    what is computed for the filling is cut off.

    Args:
        fn: maps the number of a batch and a pytree with leading axis `batch_size` to a
            pytree with that leading axis.
        rows: pytree of host arrays with a common leading axis N, at least 1.
        batch_size: a multiple of the mesh's batch shards.
        mesh: where to compute.

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
