"""Response masks, and reductions that ignore masked entries.

Values are selected with `jnp.where`, never multiplied by the mask: padding may hold
NaN, and 0 · NaN is NaN.
"""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Scalar

Aggregation = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
]


def response_mask(tokens: Array, *, stop_ids: int | Sequence[int] | Array) -> Array:
    """The response mask: all tokens up to and including the first stop token.

    A row without a stop token is real over its full width. The pad id is not used, so
    it may equal a stop id.

    Args:
        tokens: `[B, T]` integer, responses that start at column 0.
        stop_ids: the token id, or ids, that end a response; an empty sequence means
            none.

    Returns:
        `[B, T]` bool, True up to and including the first stop token.

    Raises:
        AssertionError: when `tokens` is not a matrix of integers.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_type(tokens, int)
    ids = jnp.asarray(stop_ids, tokens.dtype).reshape(1, 1, -1)
    is_stop = jnp.any(tokens[:, :, None] == ids, axis=2)  # [B, T]
    stops = jnp.cumsum(is_stop.astype(jnp.int32), axis=1)
    return (stops == 0) | (is_stop & (stops == 1))


def column_indices(x: Array) -> Array:
    """`[1, T]` int32: 0 … T − 1, for comparison with an index per row.

    Args:
        x: `[B, T]`, any dtype; only its shape is read.
    """
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]


def last_token_index(mask: Array) -> Array:
    """Column of the last real token of every row; 0 for a row without any.

    Args:
        mask: `[B, T]` bool, True on real tokens, in any pattern.

    Returns:
        `[B]` int32.

    Raises:
        AssertionError: when `mask` is not a matrix of bool.
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    return jnp.max(jnp.where(mask, column_indices(mask), 0), axis=1)


def include_end_state(mask: Array) -> Array:
    """The mask extended by the state after the last real token.

    Full and empty rows are unchanged. With the score `"after_last_token"`, this is the
    mask of valid rewards and values.

    Args:
        mask: `[B, T]` bool, True on real tokens.

    Returns:
        `[B, T]` bool.

    Raises:
        AssertionError: when `mask` is not a matrix of bool.
    """
    after = last_token_index(mask)[:, None] + 1  # [B, 1]
    return mask | (
        (column_indices(mask) == after) & jnp.any(mask, axis=1, keepdims=True)
    )


def select_index(x: Array, index: Array) -> Array:
    """Selects one entry per row.

    Uses a comparison and a sum instead of indexing: `x[arange(B), index]` does not
    trace on a mesh with explicit axes. The other entries may hold NaN.

    Args:
        x: `[B, S]`, any dtype but bool.
        index: `[B]` integer, in `[0, S)`; 0 is returned for an index out of range.

    Returns:
        `[B]`, x[b, index[b]], in the dtype of `x`.

    Raises:
        AssertionError: on a wrong rank.
    """
    chex.assert_rank([x, index], [2, 1])
    hit = column_indices(x) == index[:, None]
    return jnp.sum(jnp.where(hit, x, jnp.zeros_like(x)), axis=1, dtype=x.dtype)


def masked_mean(
    x: Array, mask: Array, *, axis: int | Sequence[int] | None = None
) -> Array:
    """Mean over the mask: Σ m·x / max(Σ m, 1).

    Args:
        x: any shape, float; may hold anything where `mask` is False.
        mask: the same shape, bool.
        axis: axis or axes to reduce; all by default.

    Returns:
        float32, without the reduced axes; 0 where nothing is selected.

    Raises:
        AssertionError: on unequal shapes or a wrong dtype.
    """
    chex.assert_equal_shape([x, mask])
    chex.assert_type([x, mask], [float, bool])
    if isinstance(axis, int | Integral):
        axis = int(axis)
    elif axis is not None:
        axis = tuple(axis)
    total = jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0), axis=axis)
    count = jnp.sum(mask.astype(jnp.float32), axis=axis)
    return total / jnp.maximum(count, 1.0)


def masked_whiten(
    x: Array,
    mask: Array,
    *,
    center: bool = True,
    ddof: int = 0,
    eps: Scalar = 1e-8,
    shards: int = 1,
) -> Array:
    """Scales values to variance 1, and by default centers them, over all real tokens.

        μ = Σ m·x / n          σ² = Σ m·(x − μ)² / (n − ddof)          n = Σ m
        y = (x − μ) / √(σ² + eps)     and, with `center=False`,     y + μ

    A constant input becomes 0 at any magnitude. Under `jit` on a sharded batch the
    statistics are those of the global batch, not of one device.

    Args:
        x: `[B, T]` float; may hold anything where `mask` is False.
        mask: `[B, T]` bool, True on the tokens that count.
        center: False adds the mean back, so that only the scale changes (rewards in
            lm-human-preferences; `shift_mean=False` there).
        ddof: 0 divides the squares by n, 1 by n − 1.
        eps: added to the variance.
        shards: whiten this many equal, contiguous parts of the batch separately, as in
            implementations that whiten per rank. The result then depends on the number
            of ranks: keep 1 except to reproduce them.

    Returns:
        `[B, T]` float32, 0 where `mask` is False.

    Raises:
        ValueError: when `shards` does not divide B.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Ziegler et al., 2019, arXiv:1909.08593; `whiten` in its code.
    """
    chex.assert_equal_shape([x, mask])
    if shards != 1:
        if shards < 1 or x.shape[0] % shards:
            raise ValueError(
                f"shards={shards}: expected a divisor of the {x.shape[0]} rows"
            )
        whiten = partial(masked_whiten, center=center, ddof=ddof, eps=eps)
        parts = (shards, x.shape[0] // shards, *x.shape[1:])
        return jax.vmap(whiten)(x.reshape(parts), mask.reshape(parts)).reshape(x.shape)
    chex.assert_rank([x, mask], 2)
    chex.assert_type([x, mask], [float, bool])
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    mean = masked_mean(x, mask)
    # Removes the rounding error of the mean, which √eps = 1e-4 would amplify if x is
    # large and constant.
    mean = mean + masked_mean(x - mean, mask)
    centred = jnp.where(mask, x - mean, 0.0)
    freedom = jnp.sum(mask.astype(jnp.float32)) - jnp.asarray(ddof, jnp.float32)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(freedom, 1.0)
    whitened = centred * jax.lax.rsqrt(variance + jnp.asarray(eps, jnp.float32))
    return whitened if center else jnp.where(mask, whitened + mean, 0.0)


def aggregate(
    terms: Array,
    mask: Array,
    *,
    mode: Aggregation = "token-mean",
    num_tokens: Scalar | None = None,
    num_sequences: Scalar | None = None,
    length: Scalar | None = None,
) -> Array:
    """Reduces per-token losses to a scalar.

    =========================  ==========================================
    `mode`                     value, with n = Σ m and b non-empty rows
    =========================  ==========================================
    `token-mean`               Σ m·L / n
    `seq-mean-token-mean`      1/b · Σ_rows (Σ_t m·L / Σ_t m)
    `seq-mean-token-sum`       1/b · Σ_rows Σ_t m·L
    `seq-mean-token-sum-norm`  1/b · Σ_rows (Σ_t m·L / length)
    `token-sum`                Σ m·L
    =========================  ==========================================

    Only a divisor that is the same for all responses preserves the direction of the
    policy gradient. `seq-mean-token-sum` has none, so its gradient grows with response
    length until gradient clipping is active at every step; `seq-mean-token-sum-norm`
    (Dr. GRPO) divides it by a constant.

    If a minibatch is split into microbatches, pass the minibatch's n and b to each of
    them: then the results and gradients add up to those of the minibatch.

    Args:
        terms: `[B, T]` float; may hold anything where `mask` is False.
        mask: `[B, T]` bool, True on real tokens.
        mode: which of the five.
        num_tokens: `[]`, n to divide by in `token-mean`; that of `mask` by default.
        num_sequences: `[]`, b to divide by in the `seq-mean` modes; the rows of `mask`
            with at least one real token by default.
        length: `[]`, positive, the divisor of `seq-mean-token-sum-norm`: the maximum
            response length, T by default.

    Returns:
        `[]` float32; 0 when nothing is selected.

    Raises:
        ValueError: on an unknown mode.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        The constant divisor: Liu et al., 2025, arXiv:2503.20783, section 3.2;
        `seq-mean-token-sum-norm` is its name in verl.
    """
    chex.assert_rank([terms, mask], 2)
    chex.assert_equal_shape([terms, mask])
    chex.assert_type([terms, mask], [float, bool])
    terms = jnp.where(mask, terms.astype(jnp.float32), 0.0)
    if mode == "token-sum":
        return jnp.sum(terms)
    if mode == "token-mean":
        count = jnp.sum(mask.astype(jnp.float32)) if num_tokens is None else num_tokens
        return jnp.sum(terms) / _divisor(count)
    if num_sequences is None:
        num_sequences = jnp.sum(jnp.any(mask, axis=1).astype(jnp.float32))
    if mode == "seq-mean-token-sum":
        return jnp.sum(terms) / _divisor(num_sequences)
    if mode == "seq-mean-token-sum-norm":
        length = terms.shape[1] if length is None else length
        length = jnp.asarray(length, jnp.float32)
        return jnp.sum(terms) / (_divisor(num_sequences) * length)
    if mode == "seq-mean-token-mean":
        return jnp.sum(masked_mean(terms, mask, axis=1)) / _divisor(num_sequences)
    raise ValueError(
        f"mode={mode!r}: expected one of {', '.join(map(repr, get_args(Aggregation)))}"
    )


def _divisor(count: Scalar) -> Array:
    return jnp.maximum(jnp.asarray(count, jnp.float32), 1.0)
