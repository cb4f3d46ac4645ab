"""Small models and a byte tokenizer, for tests and examples."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from rlhf_jax.algo.types import Params
from rlhf_jax.models.config import DecoderConfig, Head, gpt2_config, llama_config
from rlhf_jax.models.hf.tensor_layout import parameter_shapes
from rlhf_jax.models.rope import LinearRopeScaling, Rope, RopeScaling
from rlhf_jax.models.tokenizer import train_tokenizer
from rlhf_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """258 tokens: EOS is 0, pad is 1, and one token per byte."""
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


def tiny_gemma(
    head: Head = "lm", *, vocab_size: int = 258, max_positions: int = 64, seed: int = 0
) -> tuple[Transformer, Params]:
    """A random Gemma 3 of 3 layers, width 32, 4 query heads and 2 key/value heads.

    Two layers have a window of 6 tokens and one has full attention; logits are capped,
    which Gemma 3 supports but does not use. So it covers most differences between
    families.
    """
    config = DecoderConfig(
        family="gemma3_text",
        vocab_size=vocab_size,
        max_positions=max_positions,
        width=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=40,
        rope=Rope(theta=1e6, scaling=LinearRopeScaling(factor=8.0)),
        local_rope=Rope(theta=1e4),
        norm="rms_plus_one",
        residual="sandwich",
        query_key_norm="head",
        activation="gelu_tanh",
        attention_scale=24**-0.5,
        attention_softcap=2.0,
        logit_softcap=3.0,
        embedding_scale=32**0.5,
        sliding_window=6,
        sliding_layers=(True, False, True),
        tie_embeddings=True,
        norm_eps=1e-6,
    )
    return _randomly(config, head, seed)


def _randomly(
    config: DecoderConfig, head: Head, seed: int
) -> tuple[Transformer, Params]:
    """Randomizes every parameter, including biases and norms, so that each has an
    effect.

    The scale is ten times the usual: otherwise all logits of such a small model are
    nearly equal, and a test could not distinguish tokens. Uses NumPy, because compiling
    `module.init` takes seconds.
    """
    module = Transformer(dataclasses.replace(config, initializer_range=0.2), head=head)
    rng = np.random.default_rng(seed)
    leaves = {}
    for name, leaf in parameter_shapes(module).items():
        is_factor = name.endswith("scale") and config.norm != "rms_plus_one"
        center = 1.0 if is_factor else 0.0
        leaves[name] = jnp.asarray(rng.normal(center, 0.2, leaf.shape), leaf.dtype)
    return module, unflatten_dict(leaves, sep="/")
