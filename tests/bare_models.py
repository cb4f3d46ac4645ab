"""Networks as bare functions of parameters and arrays: no class, no library.

Small enough to follow by hand and to compile at once. They fit
`rlhf_jax.interfaces.LogitsFn` and `SequenceValuesFn`.
"""

import jax
import jax.numpy as jnp
import numpy as np


def bigram_logits(table, tokens, mask):
    """`[V, V]`, `[B, S]` → `[B, S, V]`: the row of the token just read."""
    return table[tokens]


def bigram_prefill(table, tokens, mask, *, cache_length):
    """The cache is the number of tokens decoded."""
    return table[tokens[:, -1]], jnp.zeros((), jnp.int32)


def bigram_decode(table, tokens, cache):
    return table[tokens], cache + 1


def context(params, tokens, mask):
    """`[B, S, D]`: the embedding of the token just read, and the mean of all so far."""
    embedded = jnp.where(mask[..., None], params["embedding"][tokens], 0.0)
    count = jnp.maximum(jnp.cumsum(mask, axis=1), 1).astype(jnp.float32)
    return embedded + jnp.cumsum(embedded, axis=1) / count[..., None]


def context_logits(params, tokens, mask):
    """`[B, S, V]`."""
    return context(params, tokens, mask) @ params["kernel"]


def context_values(params, tokens, mask):
    """`[B, S]`."""
    return context(params, tokens, mask) @ params["score"]


def context_params(key, *, vocab_size, width, scale=0.5):
    """Parameters of `context_logits`, and of `context_values`."""
    keys = jax.random.split(key, 4)
    draw = lambda i, *shape: scale * jax.random.normal(keys[i], shape)  # noqa: E731
    return (
        {"embedding": draw(0, vocab_size, width), "kernel": draw(1, width, vocab_size)},
        {"embedding": draw(2, vocab_size, width), "score": draw(3, width)},
    )


def left_padded(rows, *, width, pad=0):
    """Lists of ids → `[B, width]` int32 and the `[B]` int32 lengths."""
    tokens = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)
