"""Small models and a byte tokenizer, for tests and examples."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rlhf_jax.algo.types import Params
from rlhf_jax.models.config import (
    DecoderConfig,
    Head,
    gpt2_config,
    llama_config,
)
from rlhf_jax.models.rope import RopeScaling
from rlhf_jax.models.tensor_layout import parameter_shapes
from rlhf_jax.models.tokenizer import train_tokenizer
from rlhf_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """258 tokens: EOS is 0, pad is 1, and one token for each byte."""
    return train_tokenizer([], vocab_size=258)


def tiny_gpt2(
    head: Head = "lm", *, vocab_size: int = 258, max_positions: int = 64, seed: int = 0
) -> tuple[Transformer, Params]:
    """A random GPT-2 of 2 layers, width 32 and 4 heads."""
    config = gpt2_config(
        vocab_size=vocab_size,
        max_positions=max_positions,
        width=32,
        num_layers=2,
        num_heads=4,
    )
    return _randomly(config, head, seed)


def tiny_llama(
    head: Head = "lm",
    *,
    vocab_size: int = 258,
    max_positions: int = 64,
    tie_embeddings: bool = False,
    rope_scaling: RopeScaling | None = None,
    seed: int = 0,
) -> tuple[Transformer, Params]:
    """A random Llama of 2 layers, width 32, 4 query heads and 2 key/value heads."""
    config = llama_config(
        vocab_size=vocab_size,
        max_positions=max_positions,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=64,
        tie_embeddings=tie_embeddings,
        rope_scaling=rope_scaling,
    )
    return _randomly(config, head, seed)


def _randomly(
    config: DecoderConfig, head: Head, seed: int
) -> tuple[Transformer, Params]:
    """Every parameter drawn, biases and norms too, so that none is without effect.

    The scale is ten times the usual: otherwise all logits of so small a model are
    alike, and a test could not tell a token from its neighbour. Drawn with NumPy:
    compiling `module.init` takes seconds.
    """
    module = Transformer(dataclasses.replace(config, initializer_range=0.2), head=head)
    rng = np.random.default_rng(seed)
    leaves = {}
    for name, leaf in parameter_shapes(module).items():
        center = 1.0 if name.endswith("scale") else 0.0
        leaves[name] = jnp.asarray(rng.normal(center, 0.2, leaf.shape), leaf.dtype)
    return module, unflatten_dict(leaves, sep="/")
