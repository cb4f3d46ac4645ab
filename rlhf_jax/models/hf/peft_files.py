"""Adapters ↔ the files of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

PEFT adapts modules, which may fuse several of our matrices (GPT-2's `c_attn` is query,
key and value). The adapters of n such matrices become one of rank n R: stacked A's, and
a block-diagonal B. When loaded, these are split again; any other B is split by rows,
and all parts share its A.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.files.printable import one_line, printable, shown
from rlhf_jax.files.regular_file import model_file
from rlhf_jax.models.families import SCORE, TensorRule, family_of
from rlhf_jax.models.hf.leaf_placement import count_not_finite, to_host
from rlhf_jax.models.hf.model_directory import replaced_directory
from rlhf_jax.models.hf.peft_config import (
    CONFIG,
    PeftConfig,
    peft_fields,
    read_peft_config,
)
from rlhf_jax.models.hf.safetensors_files import (
    FLOATS,
    check_finite_to_save,
    read_header,
)
from rlhf_jax.models.hf.tensor_layout import (
    StoredTensor,
    parameter_shapes,
    stored_array,
)
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TENSORS = "adapter_model.safetensors"
_ROOT = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Module:
    """A module adapted by PEFT, and our layers in it."""

    pattern: str  # its name, with `{layer}`
    layers: tuple[str, ...]
    width: int  # its inputs
    sizes: tuple[int, ...]  # outputs of each of our layers
    rule: TensorRule

    def joined(self, leaves: dict[str, Any], *, layer: int | None) -> np.ndarray:
        """Arrays by our layers' names, concatenated on the last axis as in the file."""
        rule = dataclasses.replace(self.rule, leaves=self.layers, layout="same")
        return stored_array(StoredTensor(rule=rule, layer=layer, shape=()), leaves)


def write_adapter(
    path: str | Path,
    module: Transformer,
    trained: Params,
    options: LoraOptions,
    *,
    base: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Saves adapters that `peft.PeftModel.from_pretrained` and `read_adapter` can load.

    Args:
        path: directory to write; its contents are replaced.
        module: the transformer.
        trained: adapters, and the score head if the model has one.
        options: of the adapters.
        base: name or path of the base model.
        tokenizer: saved with them.

    Raises:
        ValueError: if the configuration fits no family, `path` is a file, or a value
            is NaN or infinite.
    """
    tensors: dict[str, np.ndarray] = {}
    joined: dict[str, int] = {}
    targets: list[str] = []
    modules = list(_modules(module))
    for part in modules:
        names = [name for name in part.layers if name in trained["layers"]]
        if not names:
            continue
        target = _short_name(part, modules)
        targets.append(target)
        if len(part.layers) > 1:
            joined[target] = len(names)
        for layer in range(module.config.num_layers):
            a, b = _written(part, names, trained["layers"], layer)
            name = _ROOT + part.pattern.format(layer=layer)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b)
    if "score" in trained:
        tensors[_ROOT + SCORE.name] = to_host(trained["score"])[None]
    for name, values in tensors.items():
        check_finite_to_save(name, values)
    fields = peft_fields(
        options,
        base=base,
        is_classifier=module.head != "lm",
        targets=targets,
        joined=joined,
        fan_in_fan_out=any(part.rule.layout == "same" for part in modules),
    )
    is_writer = jax.process_index() == 0
    staged = replaced_directory(Path(path), with_tokenizer=tokenizer is not None)
    with staged if is_writer else nullcontext() as directory:
        if directory is not None:
            save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
            text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
            (directory / CONFIG).write_text(text, "utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)


def read_adapter(
    path: str | Path, module: Transformer, *, dropout: float = 0.0
) -> tuple[Params, LoraOptions]:
    """Loads adapters saved by PEFT or `write_adapter`.

    Layers missing in the file get zeros, which training never changes. Scales that
    differ between modules are folded into B.

    Args:
        path: directory of the adapter.
        module: the transformer that it adapts.
        dropout: for further training.

    Returns:
        The trainable tree in float32, with the score head if there is one, and options
        with its rank, scale and targets.

    Raises:
        ValueError: if it is not plain LoRA, or tensors do not match this model.
    """
    path = Path(path)
    config = read_peft_config(path)
    tensors = _load(path)
    layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    base_scale = config.scale("", config.rank)
    for part in _modules(module):
        found = _take_module(path, module, part, tensors, config, base_scale)
        if found is not None:
            layers |= _taken_apart(part, *found, rank=config.rank)
    trained: Params = {}
    for suffix in ("weight", "modules_to_save.weight"):
        score = tensors.pop(f"{_ROOT}score.{suffix}", None)
        if score is None:
            continue
        if score.shape != (1, module.config.width):
            raise ValueError(
                f"{path / TENSORS}: score.weight has shape {score.shape}; this model "
                f"needs (1, {module.config.width}), a classifier with one label"
            )
        trained["score"] = jnp.asarray(score[0], jnp.float32)
    if tensors:
        raise ValueError(
            f"{path / TENSORS}: {shown(min(tensors))} matches no linear layer of a "
            f"{module.config.family} model's blocks; other layers are not supported"
        )
    if not layers:
        raise ValueError(f"{path / TENSORS} has no adapters")
    rank = max(a.shape[-1] for a, _ in layers.values())
    trained["layers"] = {
        name: {"lora_a": _padded(a, -1, rank), "lora_b": _padded(b, 1, rank)}
        for name, (a, b) in layers.items()
    }
    options = LoraOptions(
        rank=rank,
        alpha=base_scale * (math.sqrt(rank) if config.rslora else rank),
        dropout=dropout,
        targets=tuple(sorted(layers)),
        rslora=config.rslora,
    )
    return trained, options


def _modules(module: Transformer) -> Iterator[_Module]:
    """Every linear module of the blocks."""
    family = family_of(module.config)
    shapes = parameter_shapes(module)
    for rule in family.trunk:
        if rule.leaves[0].endswith("/kernel") and rule.leaves[0] in shapes:
            yield _Module(
                pattern=family.prefix + rule.name.removesuffix(".weight"),
                layers=tuple(leaf.split("/")[1] for leaf in rule.leaves),
                width=shapes[rule.leaves[0]].shape[1],
                sizes=tuple(shapes[leaf].shape[-1] for leaf in rule.leaves),
                rule=rule,
            )


def _short_name(part: _Module, modules: list[_Module]) -> str:
    """The last component of its name, or two if one is ambiguous."""
    words = part.pattern.split(".")
    alike = [m for m in modules if m.pattern.endswith(f".{words[-1]}")]
    return ".".join(words[-1:] if len(alike) == 1 else words[-2:])


def _written(
    part: _Module,
    names: list[str],
    layers: dict[str, dict[str, Array]],
    layer: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A `[n R, in]` and B `[out, n R]` of one module, from n of our layers."""
    pairs = [
        tuple(to_host(layers[name][leaf], layer) for leaf in ("lora_a", "lora_b"))
        for name in names
    ]
    a = np.concatenate([a.T for a, _ in pairs])
    if len(part.layers) == 1:
        return a, pairs[0][1].T
    rank = pairs[0][0].shape[1]
    blocks = {
        name: np.zeros((len(a), size), np.float32)
        for name, size in zip(part.layers, part.sizes, strict=True)
    }
    for number, (name, (_, b)) in enumerate(zip(names, pairs, strict=True)):
        blocks[name][number * rank : (number + 1) * rank] = b
    return a, part.joined(blocks, layer=None).T


def _load(path: Path) -> dict[str, np.ndarray]:
    file = model_file(path, TENSORS)
    for stored, entry in read_header(file)[1].items():
        name = printable(stored, limit=100)
        is_score = stored.startswith(f"{_ROOT}score.")
        if entry["dtype"] not in FLOATS or len(entry["shape"]) != 2:
            raise ValueError(
                f"{file}: tensor {name} has dtype {entry['dtype']} and shape "
                f"{shown(entry['shape'])}; adapters are matrices of {', '.join(FLOATS)}"
            )
        if 0 in entry["shape"] and not is_score:
            raise ValueError(f"{file}: tensor {name} is empty")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be loaded: {one_line(error)}") from None
    for name, tensor in tensors.items():
        bad = count_not_finite(tensor, np.float32)
        if bad:
            raise ValueError(
                f"{file}: tensor {printable(name, limit=100)} has {bad} values "
                "that are NaN or infinite"
            )
    return tensors


def _take_module(
    path: Path,
    module: Transformer,
    part: _Module,
    tensors: dict[str, np.ndarray],
    config: PeftConfig,
    base_scale: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """A `[L, in, R]` and B `[L, R, out]` of one module, removed from the tensors."""
    pattern = re.escape(_ROOT + part.pattern).replace(r"\{layer\}", r"(\d+)")
    names = [n for n in tensors if re.fullmatch(rf"{pattern}\.lora_[AB]\.weight", n)]
    if not names:
        return None
    count = module.config.num_layers
    width, features = part.width, sum(part.sizes)
    rank = max(tensors[n].shape[0] for n in names if ".lora_A." in n)
    stacked_a = np.zeros((count, width, rank), np.float32)
    stacked_b = np.zeros((count, rank, features), np.float32)
    for layer in range(count):
        name = part.pattern.format(layer=layer)
        a = tensors.pop(f"{_ROOT}{name}.lora_A.weight", None)
        b = tensors.pop(f"{_ROOT}{name}.lora_B.weight", None)
        if a is None and b is None:
            continue
        if a is None or b is None:
            half = "lora_A" if a is None else "lora_B"
            raise ValueError(f"{path / TENSORS}: {name} has no {half}.weight")
        own = a.shape[0]
        if a.shape != (own, width) or b.shape != (features, own):
            raise ValueError(
                f"{path / TENSORS}: {name} has A {a.shape} and B {b.shape}; this model "
                f"needs ({own}, {width}) and ({features}, {own})"
            )
        scale = config.scale(name, own)
        b = b.astype(np.float32)
        if not math.isclose(scale, base_scale, rel_tol=1e-6):
            b = b * np.float32(scale / base_scale)
        stacked_a[layer, :, :own] = a.T
        stacked_b[layer, :own] = b.T
    return stacked_a, stacked_b


def _taken_apart(
    part: _Module, a: np.ndarray, b: np.ndarray, *, rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Splits a module's adapter into the adapters of our layers.

    Args:
        part: the module.
        a: `[L, in, n R]`.
        b: `[L, n R, out]`.
        rank: R of the original adapters, if they were fused.
    """
    numbers = {
        name: np.full(size, i)
        for i, (name, size) in enumerate(zip(part.layers, part.sizes, strict=True))
    }
    owner = part.joined(numbers, layer=None)  # [out], the layer of each column
    parts = {name: b[:, :, owner == i] for i, name in enumerate(part.layers)}
    places = _blocks(list(parts.values()), rank)
    if places is None:
        return {name: (a, own) for name, own in parts.items()}
    return {
        name: (a[:, :, at : at + rank], parts[name][:, at : at + rank])
        for name, at in zip(part.layers, places, strict=True)
        if at is not None
    }


def _blocks(parts: list[np.ndarray], rank: int) -> list[int | None] | None:
    """The start of the R rows of each part, for fused adapters.

    None for a part that was not adapted. None instead of a list: not fused.

    Args:
        parts: B's `[L, n R, out]`.
        rank: R.
    """
    count, rest = divmod(parts[0].shape[1], rank)
    if len(parts) == 1 or rest or count < 2:
        return None
    used = [np.flatnonzero(part.any(axis=(0, 2))) // rank for part in parts]
    if count == len(parts):  # one for each, even if B is still zero
        joined = all((blocks == i).all() for i, blocks in enumerate(used))
        return [i * rank for i in range(count)] if joined else None
    adapted = [blocks for blocks in used if blocks.size]
    if len(adapted) != count or any(
        (blocks != i).any() for i, blocks in enumerate(adapted)
    ):
        return None
    places = iter(range(count))
    return [next(places) * rank if blocks.size else None for blocks in used]


def _padded(x: np.ndarray, axis: int, size: int) -> Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, size - x.shape[axis])
    return jnp.asarray(np.pad(x, room))
