"""The built-in transformer as the callables that algorithms need."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from rlhf_jax.algo.logprobs import before_response, fused_token_logprobs
from rlhf_jax.algo.types import Array, Params, Scalar
from rlhf_jax.interfaces import (
    ActorCriticFn,
    DecodeFn,
    PrefillFn,
    ScoreFn,
    TokenLogprobsFn,
    ValuesFn,
)
from rlhf_jax.models.attention import KVCache
from rlhf_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Policy:
    """The functions of a language model that rollout and learner call."""

    token_logprobs: TokenLogprobsFn
    prefill: PrefillFn
    decode: DecodeFn


def _apply(module: Transformer, params: Params, *args: Any, **options: Any) -> Any:
    return module.apply({"params": params}, *args, **options)


def policy(module: Transformer) -> Policy:
    """Callables of a transformer with the `"lm"` head."""

    def token_logprobs(
        params: Params,
        tokens: Array,
        mask: Array,
        /,
        *,
        response_length: int,
        temperature: Scalar,
    ) -> tuple[Array, Array]:
        hidden = _apply(module, params, tokens, mask, method="hidden")
        return fused_token_logprobs(
            before_response(hidden, response_length),
            _apply(module, params, method="unembedding"),
            tokens[:, -response_length:],
            temperature=temperature,
            softcap=module.config.logit_softcap,
        )

    def prefill(
        params: Params, tokens: Array, mask: Array, /, *, cache_length: int
    ) -> tuple[Array, KVCache]:
        return _apply(module, params, tokens, mask, cache_length, method="prefill")

    def decode(
        params: Params, tokens: Array, cache: KVCache, /
    ) -> tuple[Array, KVCache]:
        return _apply(module, params, tokens, cache, method="decode")

    return Policy(token_logprobs=token_logprobs, prefill=prefill, decode=decode)


def critic(module: Transformer) -> ValuesFn:
    """Values before each response token, of a transformer with the `"value"` head."""

    def values(
        params: Params, tokens: Array, mask: Array, /, *, response_length: int
    ) -> Array:
        everywhere = _apply(module, params, tokens, mask)
        return before_response(everywhere, response_length)

    return values


def reward_model(module: Transformer) -> ScoreFn:
    """Scores of whole sequences, of a transformer with the `"reward"` head."""

    def score(params: Params, tokens: Array, mask: Array, /) -> Array:
        return _apply(module, params, tokens, mask)

    return score


def shared_trunk(module: Transformer) -> tuple[ActorCriticFn, ValuesFn]:
    """Actor and critic as two heads on one shared trunk, which runs once.

    Args:
        module: a transformer with the `"lm"` head.

    Returns:
        A function for both heads, and one for the critic only; both take an
        `ActorCritic` of the language model's parameters and `{"score": [D]}`.
    """

    def read(params: Params, tokens: Array, mask: Array, length: int) -> Array:
        hidden = _apply(module, params.actor, tokens, mask, method="hidden")
        return before_response(hidden, length)

    def value_of(params: Params, hidden: Array) -> Array:
        score = params.critic["score"].astype(jnp.float32)[None, None]
        return jnp.sum(hidden.astype(jnp.float32) * score, axis=-1)

    def forward(
        params: Params,
        tokens: Array,
        mask: Array,
        /,
        *,
        response_length: int,
        temperature: Scalar,
    ) -> tuple[Array, Array, Array]:
        hidden = read(params, tokens, mask, response_length)
        logprobs, entropy = fused_token_logprobs(
            hidden,
            _apply(module, params.actor, method="unembedding"),
            tokens[:, -response_length:],
            temperature=temperature,
            softcap=module.config.logit_softcap,
        )
        return logprobs, entropy, value_of(params, hidden)

    def values(
        params: Params, tokens: Array, mask: Array, /, *, response_length: int
    ) -> Array:
        return value_of(params, read(params, tokens, mask, response_length))

    return forward, values
