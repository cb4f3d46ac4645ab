"""Builds device arrays from pieces of files, without a full copy on the host."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from rlhf_jax.algo.types import Array

PIECE_BYTES = 64 * 2**20
"""Maximum piece of a tensor on the host. Larger pieces are not faster."""

_TILE = 64

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a stored tensor, and its target position.

    Attributes:
        name: of the tensor.
        values: in the file's dtype and axis order.
        is_turned: the leaf is the transpose of the file's tensor.
        is_stacked: the leaf has a leading layer axis.
        start: start of the piece on each axis of the target.
    """

    name: str
    values: np.ndarray
    is_turned: bool
    is_stacked: bool
    start: tuple[int, ...]


def place_leaf(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding | None,
    pieces_of: Callable[[Index, int], Iterable[Piece]],
) -> Array:
    """Builds an array whose shards are filled on their devices, piece by piece.

    Args:
        shape: of the array.
        dtype: of the array; pieces are converted.
        sharding: of the array; None: the default device.
        pieces_of: `(index, piece_bytes)` → pieces of at most that size that cover this
            part of the array. A piece is released when the next one is requested.

    Returns:
        The array. Replicated parts are read once.
    """
    if sharding is None:
        whole = (slice(None),) * len(shape)
        return _fill(shape, dtype, None, pieces_of(whole, PIECE_BYTES))
    filled: dict[tuple, Array] = {}
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        part = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if part in filled:
            shards.append(jax.device_put(filled[part], device))
            continue
        size = tuple(stop - start for start, stop in part)
        pieces = pieces_of(index, PIECE_BYTES)
        filled[part] = _fill(size, dtype, device, pieces)
        shards.append(filled[part])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    shape: tuple[int, ...], dtype: Any, device: Any, pieces: Iterable[Piece]
) -> Array:
    if math.prod(shape) * np.dtype(dtype).itemsize <= PIECE_BYTES:
        host = np.zeros(shape, dtype)  # small: avoids compilation
        for piece in pieces:
            shape = _as_leaf(piece.values, piece.is_turned, piece.is_stacked).shape
            ends = zip(piece.start, shape, strict=True)
            target = host[tuple(slice(start, start + n) for start, n in ends)]
            _write(target[0] if piece.is_stacked else target, piece)
        return jnp.array(host, device=device)  # a copy; device_put may alias on CPU
    array = jnp.zeros(shape, dtype, device=device)
    on_cpu = next(iter(array.devices())).platform == "cpu"
    for piece in pieces:
        if on_cpu and piece.is_turned:  # XLA transposes slowly there
            turned = np.zeros(piece.values.shape[::-1], piece.values.dtype)
            _write(turned, piece)
            piece = dataclasses.replace(piece, values=turned, is_turned=False)
        array = _put(
            array,
            piece.values,
            piece.start,
            is_turned=piece.is_turned,
            is_stacked=piece.is_stacked,
        )
        array.block_until_ready()  # it may read the mapped file until then
    return array


def _write(target: np.ndarray, piece: Piece) -> None:
    """Writes a piece on the host, converted and transposed like the target.

    Matrices are transposed in tiles that fit into the CPU cache.
    """
    values = piece.values
    if values.dtype == target.dtype:  # NumPy copies bfloat16 elementwise
        word = f"u{values.dtype.itemsize}"
        values, target = values.view(word), target.view(word)
    with np.errstate(over="ignore"):  # counted elsewhere
        if not piece.is_turned or values.ndim != 2:
            target[...] = values.T if piece.is_turned else values
            return
        rows, columns = values.shape
        for i in range(0, rows, _TILE):
            for j in range(0, columns, _TILE):
                tile = values[i : i + _TILE, j : j + _TILE]
                target[j : j + _TILE, i : i + _TILE] = tile.T


def _as_leaf(values: Any, is_turned: bool, is_stacked: bool) -> Any:
    values = values.T if is_turned else values
    return values[None] if is_stacked else values


@partial(jax.jit, static_argnames=("is_turned", "is_stacked"), donate_argnums=0)
def _put(
    array: Array,
    values: Array,
    start: tuple[int, ...],
    *,
    is_turned: bool,
    is_stacked: bool,
) -> Array:
    """Writes a piece into an array, in place; transposed and converted on the
    device."""
    values = _as_leaf(values, is_turned, is_stacked).astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, values, start)


def to_host(x: Array, layer: int | None = None) -> np.ndarray:
    """Copies an array, or one index of its first axis, to NumPy.

    JAX keeps the host copy of an array as long as the array, so large arrays are
    fetched in pieces. Each piece comes from one device: gathering from several is
    arithmetic to XLA, which flushes subnormal numbers to zero. Arrays sharded over
    processes are gathered: all must call.
    """
    if not isinstance(x, jax.Array):
        part = x if layer is None else x[layer]
        return to_host(part) if isinstance(part, jax.Array) else np.asarray(part)
    if not x.is_fully_addressable:
        part = x if layer is None else x[layer]
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    host = np.zeros(x.shape if layer is None else x.shape[1:], x.dtype)
    for shard in x.addressable_shards:
        if shard.replica_id != 0:
            continue
        data, index = shard.data, shard.index
        if layer is not None:
            first, stop, _ = index[0].indices(x.shape[0])
            if not first <= layer < stop:
                continue
            data, index = data[layer - first], index[1:]
        _copy_to_host(data, host[index])
    return host


def _copy_to_host(x: Array, host: np.ndarray) -> None:
    if x.nbytes <= PIECE_BYTES:
        host[...] = np.asarray(x)
        return
    step = max(1, PIECE_BYTES * x.shape[0] // x.nbytes)
    for begin in range(0, x.shape[0], step):
        size = min(step, x.shape[0] - begin)
        part = jax.lax.dynamic_slice_in_dim(x, begin, size)
        host[begin : begin + size] = np.asarray(part)


def count_not_finite(values: np.ndarray, dtype: Any) -> int:
    """The number of values that are NaN or infinite, or become so in another dtype.

    Reads exponent bits, a few thousand values at a time: no copy, no float arithmetic
    (slow for bfloat16 in NumPy).

    Args:
        values: of float32, float16 or bfloat16.
        dtype: the target dtype.
    """
    source = jnp.finfo(values.dtype)
    overflows = jnp.finfo(dtype).maxexp < source.maxexp
    checked = np.dtype(dtype) if overflows else values.dtype
    info = jnp.finfo(checked)
    word = np.dtype(f"u{checked.itemsize}")
    exponent = word.type((2**info.nexp - 1) << info.nmant)
    total = 0
    rows = values.reshape(values.shape or (1,))  # a view
    step = max(1, 2**17 * rows.shape[0] // max(1, rows.size))
    for begin in range(0, rows.shape[0], step):
        part = rows[begin : begin + step]
        if overflows:
            with np.errstate(over="ignore"):
                part = part.astype(dtype)
        bits = part.view(word) & exponent
        if bits.max(initial=0) == exponent:
            total += int(np.count_nonzero(bits == exponent))
    return total
