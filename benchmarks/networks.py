"""This library's networks and prompts for a benchmark's sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from shape import Shape

from rlhf_jax.algo.types import Array, Params, Prompts
from rlhf_jax.models import Head, Transformer, gpt2_config, llama_config


def make_module(shape: Shape, head: Head) -> Transformer:
    """A transformer with float32 parameters that computes in the shape's dtype."""
    make_config = gpt2_config if shape.family == "gpt2" else llama_config
    config = make_config(
        vocab_size=shape.vocab_size,
        max_positions=shape.prompt + shape.response,
        width=shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
    )
    return Transformer(config, head=head, dtype=jnp.dtype(shape.dtype))


@functools.partial(jax.jit, static_argnums=0)
def init_params(module: Transformer, key: Array) -> Params:
    """Random parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, tokens, jnp.ones((1, 1), bool))["params"]


def draw_prompts(random: np.random.Generator, shape: Shape) -> Prompts:
    """A batch of prompts of full length, on the device."""
    size = (shape.batch, shape.prompt)
    tokens = random.integers(shape.vocab_size, size=size, dtype=np.int32)
    lengths = np.full(shape.batch, shape.prompt, np.int32)
    return Prompts(tokens=jax.device_put(tokens), lengths=jax.device_put(lengths))
