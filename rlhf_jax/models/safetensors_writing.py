"""Writes tensors into one or many safetensors files, one in memory at a time."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.models.safetensors_files import DTYPES, INDEX, SINGLE

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_ALIGNMENT = 64  # of the data; lets readers use them where they lie


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """One tensor of a file, computed when its turn comes."""

    shape: tuple[int, ...]
    dtype: Any
    compute: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
    path: Path | None,
    tensors: Mapping[str, TensorToWrite],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes `model.safetensors`, or shards and an index if that would be too large.

    Args:
        path: directory to write into; None: compute the arrays (every process must take
            part in gathering what is spread over processes) and write nothing.
        tensors: by name.
        max_shard_bytes: largest shard; a larger tensor gets a shard of its own.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, tensor in tensors.items():
        if not shards or filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else SINGLE
        weight_map |= dict.fromkeys(names, file)
        if path is not None:
            _write_file(path / file, tensors, names)
        else:
            for name in names:
                tensors[name].compute()
    if path is not None and len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(
    file: Path, tensors: Mapping[str, TensorToWrite], names: Sequence[str]
) -> None:
    """One file: length of the header, header, data (huggingface/safetensors, Format).

    By hand because the library wants all tensors of a file in memory at once, and its
    0.8.0 stores arrays that are not C-contiguous scrambled (#825).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _WORDS[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name in names:
            array = np.ascontiguousarray(tensors[name].compute())
            want = (tensors[name].shape, np.dtype(tensors[name].dtype))
            assert (array.shape, array.dtype) == want, name
            handle.write(array.reshape(-1).view(np.uint8).data)
