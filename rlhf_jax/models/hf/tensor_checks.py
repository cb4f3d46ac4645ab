"""Checks the tensors of a checkpoint against its configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.files.printable import printable
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families import SCORE, Family
from rlhf_jax.models.hf.leaf_placement import PIECE_BYTES
from rlhf_jax.models.hf.safetensors_files import FLOATS, TensorReader, open_tensors
from rlhf_jax.models.hf.tensor_layout import StoredTensor


def check_tensors(
    path: Path,
    family: Family,
    stored: Mapping[str, StoredTensor],
    tensors: TensorReader,
) -> None:
    """Checks that exactly the expected tensors exist, with their shape and a floating
    dtype.

    Reads headers only.

    Raises:
        ValueError: naming file, tensor and problem.
    """
    problems = []
    for name, tensor in stored.items():
        if name not in tensors.file_of:
            problems.append(f"{path}: tensor {name} of shape {tensor.shape} is missing")
        elif tensors.shape(name) != tensor.shape:
            problems.append(
                f"{tensors.file_of[name]}: tensor {name} has shape "
                f"{tensors.shape(name)}; config.json says {tensor.shape}"
            )
        elif tensors.dtype(name) not in FLOATS:
            problems.append(
                f"{tensors.file_of[name]}: tensor {name} is of dtype "
                f"{tensors.dtype(name)}; supported: F32, F16 or BF16"
            )
    heads = (family.lm_head.name, SCORE.name)  # of heads not requested
    for name, file in tensors.file_of.items():
        is_known = name in stored or name in heads
        if not is_known and not family.buffers.fullmatch(name):
            problems.append(
                f"{file}: tensor {printable(name, limit=100)} of shape "
                f"{tensors.shape(name)} does not belong to a "
                f"{family.model_type} model with this config.json"
            )
    _raise_first(problems)


def check_sizes(path: Path, family: Family, config: DecoderConfig) -> None:
    """Checks layers and embedding of a configuration against the tensors in files.

    So that no work is begun for a model that is not there. Reads headers only; nothing
    is checked if there are no files.

    Raises:
        ValueError: naming the file and what it has.
    """
    if not any(path.glob("model*.safetensors")):
        return
    with open_tensors(path) as tensors:
        first, *others = family.trunk
        prefix = tensor_prefix(family, tensors)
        embedding = prefix + first.name
        want = (config.vocab_size, config.width)
        if embedding in tensors.file_of and tensors.shape(embedding) != want:
            raise ValueError(
                f"{tensors.file_of[embedding]}: tensor {embedding} has shape "
                f"{tensors.shape(embedding)}; config.json says {want}"
            )
        inner = next(rule.name for rule in others if "{layer}" in rule.name)
        last = prefix + inner.format(layer=config.num_layers - 1)
        if last not in tensors.file_of:
            raise ValueError(
                f"{path}: tensor {last} is missing; config.json says that the model "
                f"has {config.num_layers} layers"
            )


def tensor_prefix(family: Family, tensors: TensorReader) -> str:
    """The family's prefix of names, or "" if the file has a bare trunk."""
    embedding = family.trunk[0].name
    bare = embedding in tensors.file_of
    return (
        ""
        if bare and family.prefix + embedding not in tensors.file_of
        else family.prefix
    )


def check_tie(family: Family, embedding: str, tensors: TensorReader) -> None:
    """Checks a stored copy of the tied output matrix; it must be identical.

    Args:
        family: of the checkpoint.
        embedding: name of the token embedding, whose header has been checked.
        tensors: the files.

    Raises:
        ValueError: if it differs.
    """
    output = family.lm_head.name
    if output not in tensors.file_of:
        return
    is_same = (
        tensors.shape(output) == tensors.shape(embedding)
        and tensors.dtype(output) in FLOATS
    )
    rows, width = tensors.shape(embedding)
    step = max(1, PIECE_BYTES // (4 * width))
    for begin in range(0, rows, step) if is_same else ():
        again, first = (
            tensors.view(name)[begin : begin + step] for name in (output, embedding)
        )
        if again.dtype == first.dtype:  # compare bits: NaN differs from itself
            again, first = (x.view(f"u{x.dtype.itemsize}") for x in (again, first))
        is_same &= np.array_equal(again, first)
        tensors.release(output)
        tensors.release(embedding)
    if not is_same:
        raise ValueError(
            f"{tensors.file_of[output]}: {output} differs from {embedding}, but "
            "config.json says tie_word_embeddings; set it to false"
        )


def check_finite(
    not_finite: Mapping[str, int], dtype: Any, tensors: TensorReader
) -> None:
    """Checks that no value is NaN or infinite.

    Args:
        not_finite: number of such values, by tensor.
        dtype: in which they are non-finite.
        tensors: the files.

    Raises:
        ValueError: naming file, tensor and count.
    """
    _raise_first(
        [
            f"{tensors.file_of[name]}: tensor {name} has {count} of "
            f"{int(np.prod(tensors.shape(name)))} values that are NaN or infinite in "
            f"{jnp.dtype(dtype).name}; use an intact copy, or a wider dtype"
            for name, count in not_finite.items()
            if count
        ]
    )


def _raise_first(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
