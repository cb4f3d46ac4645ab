"""Attention, its masks and the key/value cache, as functions of arrays.

Heads come before positions, `[B, N, S, H]`: with this layout batched matrix products
need no transposed copy, which would cost more than the arithmetic of a decode step.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Params, record


@record
class View:
    """The attention mask and rotary angles of one type of layer."""

    visible: Array  # [B, Q, C] bool, True where query q attends to key c
    rotary: tuple[Array, Array] | None  # cosine and sine, each [B, Q, R / 2]


@record
class KVCache:
    """The decoding state.

    Keys and values have one entry per layer. All rows write their next token to the
    same column, `end`, because prompts are left-padded. The weights are those of the
    model, split into layers and cast to the activation dtype once, not at every token.
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


def causal_mask(mask: Array, window: int | None = None) -> Array:
    """The causal attention mask.

    Args:
        mask: `[B, S]` bool, True on real tokens.
        window: maximum number of tokens a token attends to, including itself; None:
            all.

    Returns:
        `[B, S, S]` bool, True where q attends to k.
    """
    length = mask.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        visible &= ~jnp.tril(visible, -window)
    return visible[None] & mask[:, None, :]


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    visible: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Softmax attention with grouped key/value heads; softmax in float32.

    Args:
        queries: `[B, N, Q, H]`.
        keys: `[B, K, C, H]`; each key head serves N / K query heads.
        values: `[B, K, C, H]`.
        visible: `[B, Q, C]` bool, True where the query attends to the key. A query with
            no visible key (padding) gets a finite, meaningless output.
        scale: of the logits; None: 1 / √H.
        softcap: c, a logit x becomes c · tanh(x / c); None: no cap.

    Returns:
        `[B, N, Q, H]`, dtype of `values`.
    """
    batch, num_heads, num_queries, head_dim = queries.shape
    kv_heads, length = keys.shape[1:3]
    # The query heads of a group become extra queries to its one key head.
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.einsum(
        "bkqh,bkch->bkqc", grouped, keys, preferred_element_type=jnp.float32
    )
    logits *= head_dim**-0.5 if scale is None else scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits.reshape(batch, num_heads, num_queries, length)
    logits = jnp.where(visible[:, None], logits, -1e30)  # finite: no NaN rows
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, -1, length)
    mixed = jnp.einsum("bkqc,bkch->bkqh", weights, values)
    return mixed.reshape(batch, num_heads, num_queries, head_dim)
