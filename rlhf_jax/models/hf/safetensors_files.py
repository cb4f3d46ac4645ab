"""Reads and writes tensors in one or many safetensors files, without copies."""

import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.files.bounded_json import parse_json, read_object
from rlhf_jax.files.printable import one_line, printable, shown
from rlhf_jax.files.regular_file import MEBIBYTE, model_file, open_regular
from rlhf_jax.files.typed_fields import integer, section, text
from rlhf_jax.models.hf.leaf_placement import count_not_finite

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Safetensors names of NumPy dtypes."""
FLOATS = ("F32", "F16", "BF16")
"""Those that parameters may have."""

HEADER_BYTES = 32 * MEBIBYTE
"""Largest header of a file, and largest index; 100,000 tensors have a third of it."""
HEADER_VALUES = 4_000_000
_LONGEST_NAME = 250


class TensorReader:
    """Names, shapes and contents of the tensors in a checkpoint's files.

    Files are memory-mapped: data are read on access, and the kernel may drop them
    afterwards. Use `open_tensors`.
    """

    def __init__(self, files: list[Path]):
        self.file_of: dict[str, Path] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for file in files:
            self._maps[file], begin, header = _map(file)
            for name, entry in header.items():
                if name in self.file_of:
                    raise ValueError(
                        f"tensor {printable(name, limit=100)} is stored twice, in "
                        f"{self.file_of[name]} and {file}; keep one of the two"
                    )
                self.file_of[name] = file
                place = begin + entry["data_offsets"][0]
                self._entries[name] = (entry["dtype"], tuple(entry["shape"]), place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._entries[name][1]

    def dtype(self, name: str) -> str:
        """Safetensors dtype of a tensor, such as `"BF16"`."""
        return self._entries[name][0]

    def view(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file, read on access."""
        word, shape, place = self._entries[name]
        count = int(np.prod(shape, dtype=np.int64))
        memory = self._maps[self.file_of[name]]
        return np.frombuffer(memory, DTYPES[word], count, place).reshape(shape)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of part of a tensor."""
        return self.view(name)[index].copy()

    def release(self, name: str) -> None:
        """Releases the pages of a tensor's file from this process's memory.

        They stay in the page cache, and views stay valid.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._maps[self.file_of[name]].madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorReader]:
    """Opens `model.safetensors`, or the files listed in its index.

    Raises:
        ValueError: if there are no such files, or one is missing or corrupt.
    """
    # The maps close with their last view; closing them earlier is an error.
    yield TensorReader(_tensor_files(path))


def _map(file: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """A file's map, data offset, and header: name → dtype, shape, offsets."""
    begin, header = read_header(file)
    with open_regular(file) as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), begin, header


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a file begin, and its header: name → dtype, shape, offsets.

    The library checks that every tensor has the bytes of its shape and dtype, that it
    lies inside the file, and that none overlap.

    Raises:
        ValueError: one line that names the file and, if known, the tensor.
    """
    with open_regular(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file} cannot be read: its header would have {length:,} of the "
                f"file's {size:,} bytes; the file is cut off, or none of safetensors"
            )
        found = handle.read(length)
    try:
        text = found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error.reason}") from None
    header = parse_json(text, f"{file}, header", most_values=HEADER_VALUES)
    try:
        fields = dict(header) if isinstance(header, dict) else {"the header": header}
        fields.pop("__metadata__", None)
        for name in fields:
            _check_entry(section(fields, name))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: tensor {error}") from None
    try:
        with safe_open(file, framework="np"):
            return 8 + length, fields
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {one_line(error)}") from None


def _check_entry(entry: dict[str, Any]) -> None:
    text(entry, "dtype")
    for name in ("shape", "data_offsets"):
        numbers = entry.get(name)
        if not isinstance(numbers, list):
            raise ValueError(f"{name} is {shown(numbers)}: give a list of integers")
        for one in numbers:
            integer({name: one}, name, least=0, most=2**48)


def _tensor_files(path: Path) -> list[Path]:
    if (path / SINGLE).exists():
        return [model_file(path, SINGLE)]
    if (path / INDEX).exists():
        index = model_file(path, INDEX)
        fields = read_object(index, most_bytes=HEADER_BYTES, most_values=HEADER_VALUES)
        weight_map = fields.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map of tensors to files")
        try:
            names = {text(weight_map, tensor) for tensor in weight_map}
        except ValueError as error:
            raise ValueError(f"{index}: tensor {error}") from None
        for name in sorted(names):
            is_plain = Path(name).name == name and len(name) <= _LONGEST_NAME
            if not is_plain or Path(name).suffix != ".safetensors":
                raise ValueError(
                    f"{index} names the file {shown(name)}; only .safetensors files in "
                    "the same directory are allowed"
                )
        return [model_file(path, name) for name in sorted(names)]
    if any(path.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{path} has its weights as a pickle (pytorch_model*.bin), which can run "
            f"code when loaded and is never opened; convert it to {SINGLE}"
        )
    raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}")


_WORDS = {dtype: word for word, dtype in DTYPES.items()}


_ALIGNMENT = 64  # of the data, for zero-copy reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """One tensor of a file, computed lazily."""

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
        path: directory to write into; None: only compute the arrays (every process must
            take part in gathering sharded arrays).
        tensors: by name.
        max_shard_bytes: maximum shard size; a larger tensor gets its own shard.
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
                check_finite_to_save(name, tensors[name].compute())
    if path is not None and len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def check_finite_to_save(name: str, values: np.ndarray) -> None:
    """Raises ValueError if a tensor to save has values that are NaN or infinite."""
    bad = count_not_finite(values, values.dtype)
    if bad:
        raise ValueError(
            f"tensor {name} has {bad} of {values.size} values that are NaN or "
            "infinite; nothing was saved"
        )


def _write_file(
    file: Path, tensors: Mapping[str, TensorToWrite], names: Sequence[str]
) -> None:
    """One file: length of the header, header, data (huggingface/safetensors, Format).

    Own implementation because the library needs all tensors of a file in memory at
    once, and its 0.8.0 corrupts arrays that are not C-contiguous (#825).
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
            check_finite_to_save(name, array)
            want = (tensors[name].shape, np.dtype(tensors[name].dtype))
            assert (array.shape, array.dtype) == want, name
            handle.write(array.reshape(-1).view(np.uint8).data)
