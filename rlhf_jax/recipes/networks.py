"""Networks and training states of a run, built or loaded, and placed on its mesh."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.config import DecoderConfig, Head, gpt2_config, llama_config
from rlhf_jax.models.peft_loading import load_model
from rlhf_jax.models.quantize import quantized_leaf
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.language import Language
from rlhf_jax.runtime.config import Dtype, FreshModelConfig, RunConfig

State = TypeVar("State")


def fresh_network(
    config: FreshModelConfig, *, vocab_size: int, key: Array
) -> tuple[Transformer, Params]:
    """A language model of the given shape with random weights."""
    family = {"gpt2": gpt2_config, "llama": llama_config}[config.family]
    shape: DecoderConfig = family(
        vocab_size=vocab_size,
        max_positions=config.max_positions,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )
    module = Transformer(shape)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(module.init)(key, tokens, tokens == 0)["params"]
    return module, params


def trained_network(
    path: str, config: RunConfig, *, head: Head, mesh: Mesh, key: Array | None = None
) -> tuple[Transformer, Params]:
    """A checkpoint to go on training: float32 parameters, activations as configured."""
    module, params = load_model(path, head=head, mesh=mesh, key=key)
    return configured(module, config), params


def frozen_network(
    path: str, config: RunConfig, *, head: Head, mesh: Mesh, key: Array | None = None
) -> tuple[Transformer, Params]:
    """A checkpoint that is only read: parameters and activations as configured."""
    stored = config.lora.base_dtype or config.dtype
    dtype = config.dtype if stored == "int8" else stored
    module, params = load_model(
        path,
        head=head,
        dtype=jnp.dtype(dtype),
        mesh=mesh,
        key=key,
        convert=quantized_leaf if stored == "int8" else None,
    )
    return configured(module, config), params


def read_network(
    path: str, *, head: Head, dtype: Dtype, mesh: Mesh | None = None
) -> tuple[Transformer, Params]:
    """A checkpoint with parameters and activations of one dtype."""
    module, params = load_model(path, head=head, mesh=mesh, dtype=jnp.dtype(dtype))
    return module.clone(dtype=jnp.dtype(dtype)), params


def configured(module: Transformer, config: RunConfig) -> Transformer:
    """The module with the run's dtype, rematerialisation and layer loop."""
    return module.clone(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan_layers=config.scan_layers,
    )


def place_state(state: State, mesh: Mesh) -> tuple[State, State]:
    """A state on its mesh, and the shardings that keep it there."""
    sharding = parameter_sharding(mesh, state)
    return jax.device_put(state, sharding), sharding


def check_fits(
    module: Transformer, language: Language, *, needed: int, name: str, why: str
) -> None:
    """Raises ValueError where a model cannot read the tokens it will be given.

    Indexing past the end of a table is no error inside a compiled program: it reads
    the last row.

    Args:
        module: the model.
        language: its tokenizer.
        needed: length of the longest sequence.
        name: what the model is called in the message.
        why: where the length comes from.
    """
    vocabulary, limit = module.config.vocab_size, module.config.max_positions
    tokens = language.num_ordinary_tokens()
    if tokens > vocabulary:
        raise ValueError(
            f"{name}: its tokenizer has {tokens} tokens, but the model has embeddings "
            f"for {vocabulary}; take the tokenizer it was trained with"
        )
    if needed > limit:
        raise ValueError(
            f"{why}: {needed} tokens, but {name} reads at most {limit} (its "
            "max_positions); lower the limits or take a model with more positions"
        )
