"""int8 kernels with one scale per output, for frozen networks.

Only the matrices of the blocks are quantized; embeddings, norms, biases and heads are
not. `rlhf_jax.models.linear` multiplies by the integers and scales the product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlhf_jax.algo.types import Array, Params


@jax.jit
def quantize(kernel: Array) -> tuple[Array, Array]:
    """Integers q and scales s with W ≈ q · s, the error at most s / 2.

    Symmetric, by output: s = max|W| / 127 over the inputs of an output.

    Args:
        kernel: `[…, D, F]` floating.

    Returns:
        `[…, D, F]` int8 and `[…, F]` float32. An all-zero output has scale 1.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    integers = jnp.round(kernel / scale[..., None, :])
    return jnp.clip(integers, -127, 127).astype(jnp.int8), scale


def quantized_leaf(name: str, leaf: Array) -> dict[str, Array]:
    """Replaces a kernel of the blocks by two leaves; keeps other leaves.

    Args:
        name: its path in the parameter tree, joined by `/`.
        leaf: the array.
    """
    if not (name.startswith("layers/") and name.endswith("/kernel")):
        return {name: leaf}
    integers, scale = quantize(leaf)
    return {name: integers, f"{name}_scale": scale}


def quantize_kernels(params: Params) -> Params:
    """The parameters with the kernels of the blocks in int8; other arrays are
    shared."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    for name, leaf in list(leaves.items()):
        leaves |= quantized_leaf(name, leaf)
    return unflatten_dict(leaves, sep="/")


def dequantize(params: Params) -> Params:
    """The parameters with all kernels back in float32; other arrays are shared."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    for name in [name for name in leaves if name.endswith("/kernel_scale")]:
        scale, kernel = leaves.pop(name), name.removesuffix("_scale")
        leaves[kernel] = leaves[kernel].astype(jnp.float32) * scale[..., None, :]
    return unflatten_dict(leaves, sep="/")
