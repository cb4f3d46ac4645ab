"""Maps stacked leaves of the parameter tree to the tensors in files."""

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
    """One tensor of a file: its rule, layer and stored shape."""

    rule: TensorRule
    layer: int | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSource:
    """The location of a leaf in the files.

    Attributes:
        pattern: name of the stored tensors; `{layer}` is the layer index.
        rule: how they are built.
        place: index of this leaf in the rule.
        offset: its start on the concatenated axis, if the leaves are not interleaved.
        shape: of the leaf, including layers.
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
        """Whether axis 0 of the leaf is the layer axis, with one tensor per layer."""
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
    """Name pattern → rule, for all rules that apply to a model with these leaves."""
    rules = {prefix + rule.name: rule for rule in family.trunk}
    rules |= {rule.name: rule for rule in (family.lm_head, SCORE)}
    return {k: rule for k, rule in rules.items() if rule.leaves[0] in shapes}


def stored_tensors(
    family: Family, prefix: str, shapes: Shapes, num_layers: int
) -> dict[str, StoredTensor]:
    """Every tensor in a checkpoint of a model with these leaves, by name."""
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
    """Leaf path → its location in the files."""
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
    """Splits part of a leaf along the first axis of the file's tensors.

    This makes reads contiguous. A row of a tensor is never split.

    Args:
        source: of the leaf.
        tensors: the files.
        index: the part: a slice for each axis of the leaf.
        piece_bytes: maximum piece size, in the wider of the file's and the leaf's
            dtype.

    Yields:
        Pieces that cover the part, positioned relative to its start.
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
    """Part of a tensor in the file's orientation: a view, or a copy if leaves are
    interleaved.

    Args:
        source: of the leaf.
        tensor: the full tensor.
        axes: the part, on each axis of the leaf except layers.
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
    """Builds a stored tensor from leaves by their paths.

    For stacked leaves only one layer is copied to the host. Arrays sharded over
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
