"""Directories that hold an adapter, wherever those of a model are expected."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.config import Head
from rlhf_jax.models.families import read_config
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.peft_config import is_adapter, read_peft_config
from rlhf_jax.models.hf.peft_files import read_adapter
from rlhf_jax.models.lora import LoraOptions, MergedKernel
from rlhf_jax.models.transformer import Transformer


def load_model(
    path: str | Path,
    *,
    head: Head = "lm",
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    key: Array | None = None,
    convert: Callable[[str, Array], dict[str, Array]] | None = None,
    base: str | Path | None = None,
) -> tuple[Transformer, Params]:
    """`load_pretrained`, also of an adapter: its base model with the adapter in it.

    Args:
        path: directory of a model or of an adapter, or a name on the Hub.
        head: as in `load_pretrained`; an adapter of a classifier brings its score.
        dtype: likewise.
        mesh: likewise.
        key: likewise.
        convert: likewise, of the leaves of the whole model.
        base: of an adapter, in place of the base model that it names.

    Raises:
        ValueError: as `load_pretrained` and `read_adapter` do, or where an adapter's
            base is not at hand.
    """
    directory = local_directory(path)
    if not is_adapter(directory):
        return load_pretrained(
            directory, head=head, dtype=dtype, mesh=mesh, key=key, convert=convert
        )
    config = read_peft_config(directory)
    if config.is_classifier and head == "lm":
        raise ValueError(
            f"{path} adapts a sequence classifier; a language model is needed"
        )
    if base is None:
        base = base_of(directory)
    base = local_directory(base)
    _, shape = read_config(base)
    trained, options = read_adapter(directory, Transformer(shape, head=head))
    brings_score = head != "lm" and "score" in trained
    module, params = load_pretrained(
        base,
        head=head,
        dtype=dtype,
        mesh=mesh,
        key=jax.random.key(0) if brings_score else key,  # gives way to the adapter's
        convert=partial(_merged_leaf, trained, options, convert),
    )
    if brings_score:
        drawn = params["score"]
        score = jnp.asarray(trained["score"], drawn.dtype)
        params = params | {"score": jax.device_put(score, drawn.sharding)}
    return module, params


def _merged_leaf(
    trained: Params,
    options: LoraOptions,
    convert: Callable[[str, Array], dict[str, Array]] | None,
    name: str,
    leaf: Array,
) -> dict[str, Array]:
    """What takes the place of a leaf of the base: with its adapter in it, converted.

    One leaf after the other, so that base and sum are never both there whole.
    """
    *_, layer, last = ("", *name.split("/"))
    if last == "kernel" and layer in trained["layers"]:
        # Adapters are small: a copy on each device that has a part of the kernel.
        pair = jax.device_put(trained["layers"][layer], _everywhere(leaf))
        merged = MergedKernel(leaf, pair, options.scale).whole()
        leaf = jax.device_put(merged, leaf.sharding)
    return {name: leaf} if convert is None else convert(name, leaf)


def _everywhere(leaf: Array) -> Sharding:
    """Copies on all devices of an array."""
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return leaf.sharding


def base_of(path: Path) -> Path:
    """The directory of the model that an adapter adapts.

    Raises:
        ValueError: it is not there.
    """
    base = read_peft_config(path).base
    found = local_directory(base) if base else Path()
    if not (found / "config.json").is_file():
        raise ValueError(
            f"{path} adapts base_model_name_or_path={base!r}, and no model is there; "
            "write the right path into its adapter_config.json, or merge the two with "
            "rlhf-jax merge --model"
        )
    return found


def text_directories(path: Path, base: Path | None = None) -> tuple[Path, Path]:
    """Where the tokenizer and where `generation_config.json` of a directory are.

    Of an adapter the second, and a tokenizer that it does not bring, are its base's:
    `base`, or the one that it names.
    """
    if not is_adapter(path):
        return path, path
    base = base or base_of(path)
    return (path if (path / "tokenizer_config.json").is_file() else base), base
