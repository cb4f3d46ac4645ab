"""LoRA: a small trainable parameter tree next to a frozen one.

The trainable tree of a LoRA run mirrors the parameter tree:

    {"layers": {"query": {"lora_a": [L, D, R], "lora_b": [L, R, F]}, …}}

plus the fully trained vector `"score"` if the model has that head. `attach` combines
the two trees to compute with W + s A B without forming it; `merge` forms it.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA options: W + s A B, with s = alpha / rank.

    Attributes:
        rank: R, columns of A and rows of B; at least 1. A rank above the size of a
            matrix works but wastes memory.
        alpha: numerator of s.
        dropout: dropout rate on the inputs of A in training.
        targets: patterns (`fnmatch`) of the names of the blocks' linear layers.
        rslora: s = alpha / √rank, so that larger ranks do not train more slowly.

    References:
        Hu et al., 2021, arXiv:2106.09685; Kalajdzievski, 2023, arXiv:2312.03732.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("*",)
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")

    @property
    def scale(self) -> float:
        """The factor s of A B."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def linear_layers(params: Mapping) -> tuple[str, ...]:
    """Names of the blocks' linear layers, in order."""
    return tuple(
        name for name, leaves in params["layers"].items() if "kernel" in leaves
    )


def target_layers(params: Mapping, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The linear layers that match patterns, in order.

    Raises:
        ValueError: if a pattern matches none.
    """
    names = linear_layers(params)
    for pattern in targets:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"lora.targets={pattern!r} matches no linear layer of this model; it "
                f"has {', '.join(names)}"
            )
    found = {name for pattern in targets for name in fnmatch.filter(names, pattern)}
    return tuple(name for name in names if name in found)


def init_adapters(key: Array, params: Params, options: LoraOptions) -> Params:
    """Initializes adapters as a no-op: A random, B zero; float32.

    A is uniform in ±1/√D, PEFT's Kaiming initialization with a = √5.

    Args:
        key: consumed.
        params: of the model; a copy of its score head, if any, becomes part of the
            trainable tree.
        options: rank and targets.

    Raises:
        ValueError: if the model does not have a target.
    """
    names = target_layers(params, options.targets)
    layers = {}
    for name, layer_key in zip(names, jax.random.split(key, len(names)), strict=True):
        num_layers, width, features = params["layers"][name]["kernel"].shape
        shape = (num_layers, width, options.rank)
        bound = width**-0.5
        layers[name] = {
            "lora_a": jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound),
            "lora_b": jnp.zeros((num_layers, options.rank, features)),
        }
    return {"layers": layers} | trained_head(params)


def trained_head(params: Params) -> Params:
    """A float32 copy of the score head, `{"score": [D]}`, or an empty tree."""
    if "score" not in params:
        return {}
    return {"score": jnp.array(params["score"], jnp.float32, copy=True)}


def attach(
    base: Params, trained: Params, options: LoraOptions, *, key: Array | None = None
) -> Params:
    """Combines base and adapters into one parameter tree; shares the base arrays.

    Args:
        base: frozen parameters, in any dtype, kernels in int8 or not.
        trained: adapters and head; this head replaces that of the base.
        options: scale and dropout.
        key: for dropout in training; None: no dropout.

    Returns:
        `base` with `lora_a` and the scaled `lora_b` next to each adapted kernel; see
        `rlhf_jax.models.linear`.
    """
    whole = dict(base) | {k: v for k, v in trained.items() if k != "layers"}
    layers = dict(base.get("layers", {}))
    for number, (name, pair) in enumerate(sorted(trained.get("layers", {}).items())):
        leaves = {"lora_a": pair["lora_a"], "lora_b": options.scale * pair["lora_b"]}
        if key is not None and options.dropout > 0:
            num_layers = pair["lora_a"].shape[0]
            keys = jax.random.split(jax.random.fold_in(key, number), num_layers)
            leaves["lora_key"] = jax.random.key_data(keys)
            leaves["lora_rate"] = jnp.full(num_layers, options.dropout, jnp.float32)
        layers[name] = dict(layers[name]) | leaves
    return whole | {"layers": layers} if layers else whole


def merge(base: Params, trained: Params, options: LoraOptions) -> Params:
    """Merges adapters: parameters W + s A B, computed in float32, in the base dtypes.

    Args:
        base: parameters in floating point.
        trained: adapters and head.
        options: give the factor.

    Raises:
        ValueError: if kernels are int8, which cannot be merged exactly.
    """
    merged = merged_when_read(base, trained, options)
    layers = dict(merged["layers"])
    for name in trained["layers"]:
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"].whole()}
    return merged | {"layers": layers}


def merged_when_read(base: Params, trained: Params, options: LoraOptions) -> Params:
    """Like `merge`, but computes kernels lazily, layer by layer.

    A large model can be saved without a second copy in memory: `save_pretrained` reads
    one layer at a time.

    Args:
        base: parameters in floating point.
        trained: adapters and head.
        options: give the factor.

    Raises:
        ValueError: if kernels are int8, which cannot be merged exactly.
    """
    whole = dict(base) | {
        name: jnp.asarray(leaf, base[name].dtype if name in base else leaf.dtype)
        for name, leaf in trained.items()
        if name != "layers"
    }
    layers = dict(base["layers"])
    for name, pair in trained["layers"].items():
        if "kernel_scale" in layers[name]:
            raise ValueError(
                f"layers/{name}/kernel is stored in int8; merge adapters into the "
                "original floating-point parameters"
            )
        kernel = MergedKernel(layers[name]["kernel"], pair, options.scale)
        layers[name] = dict(layers[name]) | {"kernel": kernel}
    return whole | {"layers": layers}


@dataclasses.dataclass(frozen=True)
class MergedKernel:
    """W + s A B of every layer, `[L, D, F]`, computed when it is read."""

    kernel: Array  # [L, D, F]
    pair: Params  # lora_a [L, D, R], lora_b [L, R, F]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stacked kernels."""
        return self.kernel.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the kernels."""
        return self.kernel.dtype

    def __getitem__(self, layer: int) -> Array:
        a, b = (self.pair[name][layer] for name in ("lora_a", "lora_b"))
        return _merged(self.kernel[layer], a, b, self.scale)

    def whole(self) -> Array:
        """All layers, computed one at a time to limit float32 memory."""
        return _merged_layers(
            self.kernel, self.pair["lora_a"], self.pair["lora_b"], self.scale
        )


@jax.jit
def _merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """`[D, F]`, of one layer."""
    change = jnp.dot(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)


@jax.jit
def _merged_layers(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """`[L, D, F]`."""
    return jax.lax.map(lambda layer: _merged(*layer, scale), (kernel, a, b))
