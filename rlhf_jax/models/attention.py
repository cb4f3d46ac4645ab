"""Attention, rotary positions and the key/value cache, as functions of arrays.

Heads come before positions, `[B, N, S, H]`: the layout that batched products read
without a transposed copy, which would cost a decode step more than its arithmetic.
"""

import math

import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Params, record
from rlhf_jax.models.config import DecoderConfig, Llama3RopeScaling


@record
class KVCache:
    """What decoding carries from token to token.

    Keys and values have one entry per layer. All rows write their next token at the
    same column, `end`: prompts are left-padded. The weights are those of the model,
    cut into layers and cast to the dtype of the activations once, not at every token.
    """

    keys: tuple[Array, ...]  # L × [B, K, C, H]
    values: tuple[Array, ...]  # L × [B, K, C, H]
    mask: Array  # [B, C] bool, True where a real token is stored
    end: Array  # [] int32, column of the next token
    layers: tuple[Params, ...]  # L × parameters of a block
    unembedding: Array  # [D, V]


def positions_of(mask: Array) -> Array:
    """Positions of real tokens, counted from 0 per row; 0 on leading padding.

    Args:
        mask: `[B, S]` bool, True on real tokens.

    Returns:
        `[B, S]` int32.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def causal_mask(mask: Array) -> Array:
    """`[B, S]` bool, True on real tokens → `[B, S, S]` bool, True where q sees k."""
    length = mask.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & mask[:, None, :]


def rotary_angles(config: DecoderConfig, positions: Array) -> Array:
    """Rotation angle of each pair of dimensions.

    θ_i = base^(-2i / H), stretched as `config.rope_scaling` says; angle = position · θ.

    Args:
        config: head size, base and scaling.
        positions: `[B, S]` int32.

    Returns:
        `[B, S, H / 2]` float32, in radians.

    References:
        Su et al., 2021, arXiv:2104.09864; scaling as in Llama 3.1.
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    return positions[..., None].astype(jnp.float32) * frequencies[None, None]


def _stretch(frequencies: Array, scaling: Llama3RopeScaling) -> Array:
    """Divides low frequencies by `factor`, keeps high ones, blends in between."""
    rotations = scaling.original_max_positions * frequencies / (2 * math.pi)
    blend = (rotations - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = jnp.clip(blend, 0.0, 1.0)
    return blend * frequencies + (1.0 - blend) * frequencies / scaling.factor


def rotate(x: Array, angles: Array) -> Array:
    """Turns the pairs (x_i, x_{i + H/2}) of each head by `angles`.

    Args:
        x: `[B, N, S, H]`, queries or keys.
        angles: `[B, S, H / 2]` float32.

    Returns:
        `[B, N, S, H]`, dtype of `x`.
    """
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(queries: Array, keys: Array, values: Array, visible: Array) -> Array:
    """Softmax attention with grouped key/value heads; softmax in float32.

    Args:
        queries: `[B, N, Q, H]`.
        keys: `[B, K, C, H]`; each key head serves N / K query heads.
        values: `[B, K, C, H]`.
        visible: `[B, Q, C]` bool, True where the query sees the key. A query that sees
            nothing (padding) gets a finite, meaningless answer.

    Returns:
        `[B, N, Q, H]`, dtype of `values`.
    """
    batch, num_heads, num_queries, head_dim = queries.shape
    kv_heads, length = keys.shape[1:3]
    # The query heads of a group are so many more queries to its one key head.
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.einsum(
        "bkqh,bkch->bkqc", grouped, keys, preferred_element_type=jnp.float32
    ) / math.sqrt(head_dim)
    logits = logits.reshape(batch, num_heads, num_queries, length)
    logits = jnp.where(visible[:, None], logits, -1e30)  # finite: no NaN rows
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, -1, length)
    mixed = jnp.einsum("bkqc,bkch->bkqh", weights, values)
    return mixed.reshape(batch, num_heads, num_queries, head_dim)
