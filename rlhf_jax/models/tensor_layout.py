"""Leaves of the parameter tree, stacked over layers, as the tensors files store."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from rlhf_jax.algo.types import Array
from rlhf_jax.models.families import SCORE, Family, TensorRule
from rlhf_jax.models.safetensors_files import TensorReader
from rlhf_jax.models.transformer import Transformer

Shapes = dict[str, jax.ShapeDtypeStruct]  # leaf path, joined by "/" → shape and dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: how it is made, of which layer, and its shape there."""

    rule: TensorRule
    layer: int | None
    shape: tuple[int, ...]


def parameter_shapes(module: Transformer) -> Shapes:
    """Shapes and dtypes of the module's parameters."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    init = module.clone(scan_layers=True).init  # traced once, not once per layer
    params = jax.eval_shape(lambda t, m: init(jax.random.key(0), t, m), tokens, mask)
    shapes: dict[str, Any] = flatten_dict(params["params"], sep="/")
    return shapes


def _rules(family: Family, prefix: str, shapes: Shapes) -> dict[str, TensorRule]:
    """Name pattern → rule, of all that apply to a model with these leaves."""
    rules = {prefix + rule.name: rule for rule in family.trunk}
    rules |= {family.lm_head.name: family.lm_head, SCORE.name: SCORE}
    return {k: rule for k, rule in rules.items() if rule.leaves[0] in shapes}


def stored_tensors(
    family: Family, prefix: str, shapes: Shapes, num_layers: int
) -> dict[str, StoredTensor]:
    """Every tensor that a checkpoint of a model with these leaves has, by its name."""
    stored = {}
    for pattern, rule in _rules(family, prefix, shapes).items():
        stacked = "{layer}" in pattern
        parts = [shapes[leaf].shape[int(stacked) :] for leaf in rule.leaves]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        if rule.layout == "transposed":
            shape = shape[::-1]
        elif rule.layout == "row":
            shape = (1, *shape)
        for layer in range(num_layers) if stacked else (None,):
            name = pattern.format(layer=layer)
            stored[name] = StoredTensor(rule=rule, layer=layer, shape=shape)
    return stored


def leaf_readers(
    family: Family, prefix: str, shapes: Shapes, tensors: TensorReader
) -> dict[str, Callable[..., np.ndarray]]:
    """Leaf path → function that reads a part of that leaf."""
    readers = {}
    for pattern, rule in _rules(family, prefix, shapes).items():
        offset = 0
        for leaf in rule.leaves:
            readers[leaf] = partial(
                _read_leaf, tensors, pattern, rule.layout, offset, shapes[leaf]
            )
            offset += shapes[leaf].shape[-1]
    return readers


def _read_leaf(
    tensors: TensorReader,
    pattern: str,
    layout: str,
    offset: int,
    leaf: jax.ShapeDtypeStruct,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of a leaf, in the leaf's dtype.

    Args:
        tensors: the files.
        pattern: name of the stored tensors.
        layout: see `TensorRule`.
        offset: where the leaf begins on the last axis of the joined leaves.
        leaf: shape and dtype of the whole leaf.
        index: a slice for each axis of the leaf.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]

    def read(name: str, axes: list[range]) -> np.ndarray:
        *others, last = (slice(axis.start, axis.stop) for axis in axes)
        own = (*others, slice(last.start + offset, last.stop + offset))
        if layout == "transposed":
            part = tensors.read(name, own[::-1]).T
        elif layout == "row":
            part = tensors.read(name, (slice(0, 1), *own))[0]
        else:
            part = tensors.read(name, own)
        return part.astype(leaf.dtype)

    if "{layer}" not in pattern:
        return read(pattern, ranges)
    layers, *rest = ranges
    return np.stack([read(pattern.format(layer=i), rest) for i in layers])


def stored_array(tensor: StoredTensor, leaves: dict[str, Array]) -> np.ndarray:
    """A tensor as it is stored, made from leaves by their paths.

    Arrays that are spread over processes are gathered: all processes must call.
    """
    parts = [leaves[name] for name in tensor.rule.leaves]
    if tensor.layer is not None:
        parts = [part[tensor.layer] for part in parts]
    array = np.concatenate([_to_host(part) for part in parts], axis=-1)
    if tensor.rule.layout == "transposed":
        return array.T
    return array[None] if tensor.rule.layout == "row" else array


def _to_host(x: Array) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
