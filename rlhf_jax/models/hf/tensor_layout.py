"""Leaves of the parameter tree, stacked over layers, as the tensors files store."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from rlhf_jax.algo.types import Array
from rlhf_jax.models.families import SCORE, Family, TensorRule
from rlhf_jax.models.hf.leaf_placement import Piece, to_host
from rlhf_jax.models.hf.safetensors_files import TensorReader
from rlhf_jax.models.transformer import Transformer

Shapes = dict[str, jax.ShapeDtypeStruct]  # leaf path, joined by "/" → shape and dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: how it is made, of which layer, and its shape there."""

    rule: TensorRule
    layer: int | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSource:
    """Where the files keep a leaf.

    Attributes:
        pattern: name of the stored tensors; `{layer}` stands for the layer's index.
        rule: how they are made.
        place: which of the rule's leaves this one is.
        offset: where it begins on the joined axis, if the leaves do not alternate.
        shape: of the leaf, layers included.
        dtype: of the leaf.
    """

    pattern: str
    rule: TensorRule
    place: int
    offset: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def is_stacked(self) -> bool:
        """Whether axis 0 of the leaf counts layers, each of which is a tensor."""
        return "{layer}" in self.pattern


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
    rules |= {rule.name: rule for rule in (family.lm_head, SCORE)}
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


def leaf_sources(family: Family, prefix: str, shapes: Shapes) -> dict[str, LeafSource]:
    """Leaf path → where the files keep that leaf."""
    sources = {}
    for pattern, rule in _rules(family, prefix, shapes).items():
        offset = 0
        for place, leaf in enumerate(rule.leaves):
            sources[leaf] = LeafSource(
                pattern=pattern,
                rule=rule,
                place=place,
                offset=offset,
                shape=shapes[leaf].shape,
                dtype=shapes[leaf].dtype,
            )
            offset += shapes[leaf].shape[-1]
    return sources


def leaf_pieces(
    source: LeafSource,
    tensors: TensorReader,
    index: tuple[slice, ...],
    piece_bytes: int,
) -> Iterator[Piece]:
    """Part of a leaf, cut along the first axis of the file's tensors.

    So that reads are contiguous. A row of a tensor is never cut.

    Args:
        source: of the leaf.
        tensors: the files.
        index: the part: a slice for each axis of the leaf.
        piece_bytes: largest piece, in the file's dtype or the leaf's, whichever is
            wider.

    Yields:
        Pieces that cover the part, placed relative to its beginning.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(index, source.shape, strict=True)]
    layers = ranges.pop(0) if source.is_stacked else (None,)
    is_turned = source.rule.layout == "transposed"
    cut = len(ranges) - 1 if is_turned else 0  # axis of the leaf, without layers
    across = math.prod(len(axis) for i, axis in enumerate(ranges) if i != cut)
    for at, layer in enumerate(layers):
        name = source.pattern.format(layer=layer)
        tensor = tensors.view(name)
        itemsize = max(tensor.dtype.itemsize, np.dtype(source.dtype).itemsize)
        step = max(1, piece_bytes // max(1, across * itemsize))
        for begin in range(0, len(ranges[cut]), step):
            axes = list(ranges)
            axes[cut] = axes[cut][begin : begin + step]
            start = [0] * len(ranges)
            start[cut] = begin
            yield Piece(
                name=name,
                values=_stored_part(source, tensor, axes),
                is_turned=is_turned,
                is_stacked=source.is_stacked,
                start=(at, *start) if source.is_stacked else tuple(start),
            )


def _stored_part(
    source: LeafSource, tensor: np.ndarray, axes: list[range]
) -> np.ndarray:
    """Part of a tensor as the file turns it: a view, or a copy where leaves alternate.

    Args:
        source: of the leaf.
        tensor: the whole tensor.
        axes: the part, on each axis of the leaf without layers.
    """
    rule = source.rule
    *others, last = axes
    index: list[Any] = [slice(axis.start, axis.stop) for axis in others]
    if rule.block is None:
        index.append(slice(source.offset + last.start, source.offset + last.stop))
    else:
        assert rule.block != "head"  # Family.of
        column = np.arange(last.start, last.stop)
        number, within = np.divmod(column, rule.block)
        turn = number * len(rule.leaves) + source.place
        index.append(turn * rule.block + within)
    if rule.layout == "row":
        tensor = tensor[0]
    return tensor[tuple(index[::-1] if rule.layout == "transposed" else index)]


def stored_array(tensor: StoredTensor, leaves: dict[str, Array]) -> np.ndarray:
    """A tensor as it is stored, made from leaves by their paths.

    Of stacked leaves only the one layer comes to the host. Arrays that are spread over
    processes are gathered: all processes must call.
    """
    rule = tensor.rule
    arrays = [to_host(leaves[name], tensor.layer) for name in rule.leaves]
    if rule.block is not None:
        assert rule.block != "head"  # Family.of
        blocks = [x.reshape(*x.shape[:-1], -1, rule.block) for x in arrays]
        joined = np.stack(blocks, axis=-2)  # [..., blocks, leaves, block]
        array = joined.reshape(*joined.shape[:-3], -1)
    else:
        array = np.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]
    if rule.layout == "transposed":
        return array.T
    return array[None] if rule.layout == "row" else array
