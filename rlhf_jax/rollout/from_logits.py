"""Builds the callables of `interfaces` from one function of full sequences.

For models in plain JAX, NNX or another library. The models of this package have their
own callables, with a key/value cache and without `[B, T, V]` logits.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algo.logprobs import before_response, token_entropy, token_logprobs
from rlhf_jax.algo.types import Array, Params, Scalar, record
from rlhf_jax.interfaces import (
    DecodeFn,
    LogitsFn,
    PrefillFn,
    SequenceValuesFn,
    TokenLogprobsFn,
    ValuesFn,
)


def token_logprobs_from_logits(logits_fn: LogitsFn) -> TokenLogprobsFn:
    """Log-probabilities and entropies of responses, from next-token logits."""

    def response_logprobs(
        params: Params,
        tokens: Array,
        mask: Array,
        /,
        *,
        response_length: int,
        temperature: Scalar,
    ) -> tuple[Array, Array]:
        logits = before_response(logits_fn(params, tokens, mask), response_length)
        responses = tokens[:, -response_length:]
        return (
            token_logprobs(logits, responses, temperature=temperature),
            token_entropy(logits, temperature=temperature),
        )

    return response_logprobs


def values_from_sequence(values_fn: SequenceValuesFn) -> ValuesFn:
    """The critic before each response token, from its values at every position."""

    def response_values(
        params: Params, tokens: Array, mask: Array, /, *, response_length: int
    ) -> Array:
        values = before_response(values_fn(params, tokens, mask), response_length)
        return values.astype(jnp.float32)

    return response_values


@record
class _Text:
    """The state of decoding without a cache: the text so far."""

    tokens: Array  # [B, C] int32
    mask: Array  # [B, C] bool
    end: Array  # [] int32, column of the next token


def uncached_decoding(logits_fn: LogitsFn) -> tuple[PrefillFn, DecodeFn]:
    """Prefill and decode that recompute the full text for every token.

    Costs a full forward pass of `cache_length` columns per token: correct for any
    causal model, and fast enough for small ones.
    """

    def prefill(
        params: Params, tokens: Array, mask: Array, /, *, cache_length: int
    ) -> tuple[Array, _Text]:
        room = ((0, 0), (0, cache_length - tokens.shape[1]))
        text = _Text(
            tokens=jnp.pad(tokens, room),
            mask=jnp.pad(mask, room),
            end=jnp.asarray(tokens.shape[1], jnp.int32),
        )
        return last_logits(params, text), text

    def decode(params: Params, tokens: Array, text: _Text, /) -> tuple[Array, _Text]:
        here = (jnp.arange(text.mask.shape[1]) == text.end)[None, :]
        text = _Text(
            tokens=jnp.where(here, tokens[:, None], text.tokens),
            mask=text.mask | here,
            end=text.end + 1,
        )
        return last_logits(params, text), text

    def last_logits(params: Params, text: _Text) -> Array:
        logits = logits_fn(params, text.tokens, text.mask)
        return jax.lax.dynamic_index_in_dim(logits, text.end - 1, 1, keepdims=False)

    return prefill, decode
