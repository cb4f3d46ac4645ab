"""Hugging Face checkpoints ↔ the parameter tree, without PyTorch."""

import json
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.families import (
    SCORE,
    Family,
    config_fields,
    family_of,
    read_config,
)
from rlhf_jax.models.heads import fresh_score
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.leaf_placement import Index, Piece, count_not_finite, place_leaf
from rlhf_jax.models.hf.model_directory import replaced_directory
from rlhf_jax.models.hf.safetensors_files import (
    TensorReader,
    TensorToWrite,
    open_tensors,
    write_tensors,
)
from rlhf_jax.models.hf.tensor_checks import (
    check_finite,
    check_sizes,
    check_tensors,
    check_tie,
    tensor_prefix,
)
from rlhf_jax.models.hf.tensor_layout import (
    LeafSource,
    leaf_pieces,
    leaf_sources,
    parameter_shapes,
    stored_array,
    stored_tensors,
)
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_pretrained(
    path: str | Path,
    *,
    head: Head = "lm",
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    key: Array | None = None,
    convert: Callable[[str, Array], dict[str, Array]] | None = None,
) -> tuple[Transformer, Params]:
    """Loads a checkpoint of any supported family (`rlhf_jax.models.families`).

    Tensors are copied from file to device in pieces (`leaf_placement.PIECE_BYTES`), so
    the memory needed in addition to the parameters does not grow with model size. Code
    in a checkpoint is never run.

    Args:
        path: directory, or name on the Hub (`hub.local_directory`), with `config.json`
            and safetensors files (float32, float16 or bfloat16), of a language model,
            a sequence classifier with one label, or a bare trunk.
        head: `"value"` and `"reward"` load the classifier's `score.weight`.
        dtype: dtype of the parameters and of activations; use
            `module.clone(dtype=jnp.bfloat16)` to use different dtypes.
        mesh: shards the parameters by `parameter_sharding`; each process reads only
            what its devices hold. None: everything on the default device.
        key: initializes the score head if the checkpoint has none; otherwise unused.
        convert: `(path, leaf) -> {path: leaf}`, replaces each leaf after loading, one
            at a time, for example `quantize.quantized_leaf`.

    Returns:
        The module and its parameters.

    Raises:
        ValueError: if the directory is not a checkpoint of a supported family, a tensor
            is missing, unknown, of the wrong shape or dtype, or has NaN or infinite
            values, or the checkpoint does not have the requested head.
    """
    if head not in typing.get_args(Head):
        raise ValueError(f"head={head!r} must be one of {typing.get_args(Head)}")
    path = local_directory(path)
    family, config = read_config(path)
    check_sizes(path, family, config)
    module = Transformer(config, head=head, dtype=dtype, param_dtype=dtype)
    shapes = parameter_shapes(module)
    placements: dict[str, Any] = {}
    if mesh is not None:
        tree = parameter_sharding(mesh, unflatten_dict(shapes, sep="/"))
        placements = flatten_dict(tree, sep="/")
    with open_tensors(path) as tensors:
        prefix = tensor_prefix(family, tensors)
        _check_head(path, family, config, head, tensors, key)
        if head != "lm" and SCORE.name not in tensors.file_of:
            del shapes["score"]
        stored = stored_tensors(family, prefix, shapes, config.num_layers)
        check_tensors(path, family, stored, tensors)
        if head == "lm" and config.tie_embeddings:
            check_tie(family, prefix + family.trunk[0].name, tensors)
        not_finite: Counter[str] = Counter()
        leaves: dict[str, Array] = {}
        for name, source in leaf_sources(family, prefix, shapes).items():
            pieces_of = partial(_checked_pieces, source, tensors, not_finite)
            leaf = place_leaf(
                source.shape, source.dtype, placements.get(name), pieces_of
            )
            leaves |= {name: leaf} if convert is None else convert(name, leaf)
            del leaf
        check_finite(not_finite, dtype, tensors)
    params = unflatten_dict(leaves, sep="/")
    if head != "lm" and "score" not in params:
        assert key is not None  # _check_head
        params["score"] = fresh_score(params["final_norm"]["scale"], key)
    return module, params


def save_pretrained(
    path: str | Path,
    module: Transformer,
    params: Params,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Saves a checkpoint that `transformers` and `load_pretrained` can load.

    Critics and reward models become sequence classifiers with one label. An existing
    model in the directory is replaced atomically once the new one is complete; other
    files are kept. With several processes all must call; the first one writes. Only one
    tensor at a time is on the host, for stacked leaves one layer.

    Args:
        path: directory to write.
        module: the transformer.
        params: its parameters; saved in their dtype.
        tokenizer: saved with the model, including its chat template; defines the EOS,
            BOS and pad ids.
        generation_config: fields of `generation_config.json` to keep, such as several
            `eos_token_id` and sampling defaults; its token ids take precedence over the
            tokenizer's. Only saved for language models.
        max_shard_bytes: files are split at this size.

    Raises:
        ValueError: if `params` do not match the module, the configuration fits no
            family, `path` is a file, or a value is NaN or infinite. Nothing is saved.
    """
    config = module.config
    family = family_of(config)
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    _check_leaves(module, leaves)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in leaves.items()}
    tensors = {}
    stored = stored_tensors(family, family.prefix, shapes, config.num_layers)
    for name, tensor in stored.items():
        dtype = shapes[tensor.rule.leaves[0]].dtype
        tensors[name] = TensorToWrite(
            shape=tensor.shape,
            dtype=dtype,
            compute=partial(stored_array, tensor, leaves),
        )
    given = {k: v for k, v in (generation_config or {}).items() if v is not None}
    generation = _token_ids(tokenizer) | given
    ids = {name: generation[name] for name in _TOKEN_IDS}
    fields = config_fields(config, module.head, leaves["token_embedding"].dtype) | ids
    if module.head != "lm" and ids["pad_token_id"] in _as_list(ids["eos_token_id"]):
        # transformers takes the score at the last non-pad token. If pad were EOS, that
        # would be the token before the one we use.
        fields["pad_token_id"] = None

    is_writer = jax.process_index() == 0
    staged = replaced_directory(Path(path), with_tokenizer=tokenizer is not None)
    with staged if is_writer else nullcontext() as directory:
        write_tensors(directory, tensors, max_shard_bytes=max_shard_bytes)
        if directory is not None:
            _write_json(directory / "config.json", fields)
            if module.head == "lm":
                _write_json(directory / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def _checked_pieces(
    source: LeafSource,
    tensors: TensorReader,
    not_finite: Counter[str],
    index: Index,
    piece_bytes: int,
) -> Iterator[Piece]:
    """Pieces of part of a leaf; counts non-finite values, by tensor."""
    for piece in leaf_pieces(source, tensors, index, piece_bytes):
        not_finite[piece.name] += count_not_finite(piece.values, source.dtype)
        yield piece
        tensors.release(piece.name)


def _check_head(
    path: Path,
    family: Family,
    config: DecoderConfig,
    head: Head,
    tensors: TensorReader,
    key: Array | None,
) -> None:
    output = family.lm_head.name
    if head == "lm":
        if not config.tie_embeddings and output not in tensors.file_of:
            raise ValueError(
                f"{path} has no {output} and tie_word_embeddings is false, so it is "
                "not a language model; load it with head='value' or head='reward'"
            )
    elif SCORE.name not in tensors.file_of and key is None:
        raise ValueError(
            f"{path} has no {SCORE.name}: it is a language model without a {head} "
            "head; pass key=jax.random.key(seed) to initialize one"
        )


def _check_leaves(module: Transformer, leaves: dict[str, Any]) -> None:
    """Checks that the parameters match the module."""
    want = {name: leaf.shape for name, leaf in parameter_shapes(module).items()}
    have = {name: leaf.shape for name, leaf in leaves.items()}
    owner = f"a {type(module).__name__} with head={module.head!r}"
    for name in sorted(want.keys() | have.keys()):
        if name not in want:
            raise ValueError(f"params have {name}, which {owner} does not have")
        if name not in have:
            raise ValueError(
                f"params lack {name} of shape {want[name]}; {owner} has it"
            )
        if want[name] != have[name]:
            raise ValueError(
                f"params have {name} of shape {have[name]}; the module's configuration "
                f"says {want[name]}"
            )


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _token_ids(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    """Null if unknown: `transformers` assumes 50256 if GPT-2's EOS is missing."""
    return {name: getattr(tokenizer, name, None) for name in _TOKEN_IDS}


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
