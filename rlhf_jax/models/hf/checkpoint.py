"""A checkpoint by its name: a whole model, or an adapter and its base model."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.families import read_config
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.peft_config import is_adapter, read_peft_config
from rlhf_jax.models.hf.peft_files import read_adapter
from rlhf_jax.models.hf.tensor_checks import check_sizes
from rlhf_jax.models.lora import LoraOptions, MergedKernel
from rlhf_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the files of a model are. Made by `open_checkpoint`; no weights are read.

    Attributes:
        path: what the user typed, for messages.
        directory: holds `config.json` and weights; for an adapter, those of its base.
        adapter: directory of the adapter, or None for a whole model.
    """

    path: str
    directory: Path
    adapter: Path | None = None

    @functools.cached_property
    def config(self) -> DecoderConfig:
        """Shape of the network.

        Raises:
            ValueError: there is no `config.json` of a supported family, or it does not
                fit the tensors beside it.
        """
        family, config = read_config(self.directory)
        check_sizes(self.directory, family, config)
        return config

    @property
    def own_directory(self) -> Path:
        """What `path` names: the adapter's directory, or the model's."""
        return self.adapter or self.directory

    @property
    def tokenizer_directory(self) -> Path:
        """Holds the tokenizer: the adapter's own if it brings one, or its base's."""
        own = self.own_directory
        return own if (own / "tokenizer_config.json").is_file() else self.directory


def open_checkpoint(
    path: "str | Path | Checkpoint",
    *,
    base: str | Path | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Finds the files of a model, wherever a command takes one.

    Args:
        path: directory of a model or of an adapter, or a name on the Hub; a checkpoint
            that is open already is returned as it is.
        base: for an adapter, used instead of the base model that it names.
        weights: download them, too, where `path` is on the Hub.

    Raises:
        ValueError: the Hub does not have it, or an adapter's base is not there.
    """
    if isinstance(path, Checkpoint):
        return path
    directory = local_directory(path, weights=weights)
    if not is_adapter(directory):
        return Checkpoint(path=str(path), directory=directory)
    found = _base_of(directory) if base is None else local_directory(base)
    return Checkpoint(path=str(path), directory=found, adapter=directory)


def load_model(
    checkpoint: str | Path | Checkpoint,
    *,
    head: Head = "lm",
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    key: Array | None = None,
    convert: Callable[[str, Array], dict[str, Array]] | None = None,
) -> tuple[Transformer, Params]:
    """`load_pretrained`, also for an adapter: its base model with the adapter merged.

    Args:
        checkpoint: open, or what `open_checkpoint` takes.
        head: as in `load_pretrained`; an adapter of a classifier brings its score.
        dtype: likewise.
        mesh: likewise.
        key: likewise.
        convert: likewise, of the leaves of the whole model.

    Raises:
        ValueError: as `load_pretrained`, `open_checkpoint` and `read_adapter` do.
    """
    checkpoint = open_checkpoint(checkpoint)
    load = partial(
        load_pretrained, checkpoint.directory, head=head, dtype=dtype, mesh=mesh
    )
    if checkpoint.adapter is None:
        return load(key=key, convert=convert)
    if read_peft_config(checkpoint.adapter).is_classifier and head == "lm":
        raise ValueError(
            f"{checkpoint.path} adapts a sequence classifier; a language model is "
            "needed"
        )
    trained, options = read_adapter(
        checkpoint.adapter, Transformer(checkpoint.config, head=head)
    )
    brings_score = head != "lm" and "score" in trained
    module, params = load(
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


def _base_of(adapter: Path) -> Path:
    """The directory of the model that an adapter adapts.

    Raises:
        ValueError: it is not there.
    """
    base = read_peft_config(adapter).base
    found = local_directory(base) if base else Path()
    if not (found / "config.json").is_file():
        raise ValueError(
            f"{adapter} adapts base_model_name_or_path={base!r}, and no model is "
            "there; correct the path in its adapter_config.json, or merge the two with "
            "rlhf-jax merge --model"
        )
    return found
