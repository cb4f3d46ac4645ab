"""Tensors in one or many safetensors files, read lazily and written shard by shard."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # safetensors finds NumPy's bfloat16 only after this
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class TensorReader:
    """Names, shapes and slices of the tensors in a checkpoint's files.

    Use `open_tensors`, which closes the files.
    """

    def __init__(self, handles: dict[Path, Any]):
        self.file_of: dict[str, Path] = {}
        self._slices: dict[str, Any] = {}
        for file, handle in handles.items():
            for name in handle.keys():  # not a dict
                self.file_of[name] = file
                self._slices[name] = handle.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor in safetensors' words, such as `"BF16"`."""
        return self._slices[name].get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor; only these bytes are read."""
        return self._slices[name][index]


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorReader]:
    """Opens `model.safetensors`, or the files its index lists.

    Raises:
        ValueError: there are no such files, or one is missing or damaged.
    """
    with contextlib.ExitStack() as stack:
        handles = {}
        for file in _tensor_files(path):
            try:
                handles[file] = stack.enter_context(safe_open(file, framework="np"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
        yield TensorReader(handles)


def _tensor_files(path: Path) -> list[Path]:
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if index.is_file():
        try:
            names = set(
                json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            )
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{index} has no weight_map of tensors to files") from None
        return [path / name for name in sorted(names)]
    if any(path.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{path} holds its weights as a pickle (pytorch_model*.bin), which can run "
            f"code when read and is never opened here; convert it to {_SINGLE}"
        )
    raise ValueError(f"{path} holds neither {_SINGLE} nor {_INDEX}")


def write_tensors(
    path: Path | None,
    tensors: dict[str, tuple[int, Callable[[], np.ndarray]]],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes `model.safetensors`, or shards and an index if that would be too large.

    Only one shard is in memory at a time.

    Args:
        path: directory to write into; None: compute the arrays (every process must take
            part in gathering what is spread over processes) and write nothing.
        tensors: name → size in bytes, and a function that computes the array.
        max_shard_bytes: largest shard; a larger tensor gets a shard of its own.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, (size, _) in tensors.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else _SINGLE
        weight_map |= dict.fromkeys(names, file)
        # safetensors 0.8.0 writes other than C-contiguous arrays scrambled (#825).
        arrays = {name: np.ascontiguousarray(tensors[name][1]()) for name in names}
        if path is not None:
            save_file(arrays, path / file, metadata={"format": "pt"})
    if path is not None and len(shards) > 1:
        total = sum(size for size, _ in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
