"""Model interfaces: callables of parameters and arrays.

Any model with these callables works; `rlhf_jax.rollout.from_logits` builds all of them
from one function `(params, tokens, mask) -> logits`, and `rlhf_jax.models` provides
them for its own transformer.

Shapes as in `rlhf_jax.algo.types`. `mask` is `[B, S]` bool, True on real tokens; a
model must give the same outputs at real tokens wherever the padding is.
"""

from typing import Any, Protocol

from rlhf_jax.algo.types import Array, Params, Scalar

Cache = Any  # an opaque pytree of the model

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the leading axis of every batch is sharded."""


class LogitsFn(Protocol):
    """Logits of the next token at every position."""

    def __call__(self, params: Params, tokens: Array, mask: Array, /) -> Array:
        """`[B, S]` int32 and bool → `[B, S, V]`; column s predicts token s + 1."""
        ...


class SequenceValuesFn(Protocol):
    """The critic at every position."""

    def __call__(self, params: Params, tokens: Array, mask: Array, /) -> Array:
        """→ `[B, S]`; column s is the value after token s."""
        ...


class ScoreFn(Protocol):
    """A reward model: one number per sequence."""

    def __call__(self, params: Params, tokens: Array, mask: Array, /) -> Array:
        """→ `[B]` float."""
        ...


class TokenLogprobsFn(Protocol):
    """Log-probability and entropy at the last `response_length` tokens.

    Separate from `LogitsFn` so that a model can compute them without materializing `[B,
    T, V]`.
    """

    def __call__(
        self,
        params: Params,
        tokens: Array,
        mask: Array,
        /,
        *,
        response_length: int,
        temperature: Scalar,
    ) -> tuple[Array, Array]:
        """→ log-probabilities and entropies, each `[B, T]` float32."""
        ...


class ValuesFn(Protocol):
    """The critic before each of the last `response_length` tokens."""

    def __call__(
        self, params: Params, tokens: Array, mask: Array, /, *, response_length: int
    ) -> Array:
        """→ `[B, T]` float32; column t is V(s_t), read before response token t."""
        ...


class ActorCriticFn(Protocol):
    """Actor and critic over sequences: the function that an update differentiates.

    Two networks (`rlhf_jax.learner.separate_networks`), or one shared trunk with two
    heads that runs once.
    """

    def __call__(
        self,
        params: Params,
        tokens: Array,
        mask: Array,
        /,
        *,
        response_length: int,
        temperature: Scalar,
    ) -> tuple[Array, Array, Array]:
        """→ log-probabilities, entropies and values, each `[B, T]` float32.

        `params` is an `rlhf_jax.learner.ActorCritic`.
        """
        ...


class PrefillFn(Protocol):
    """Processes left-padded prompts and allocates the cache for the response."""

    def __call__(
        self, params: Params, tokens: Array, mask: Array, /, *, cache_length: int
    ) -> tuple[Array, Cache]:
        """`[B, P]` → logits `[B, V]` of the first response token, and the cache."""
        ...


class DecodeFn(Protocol):
    """Processes one more token per row."""

    def __call__(
        self, params: Params, tokens: Array, cache: Cache, /
    ) -> tuple[Array, Cache]:
        """`[B]` int32 → logits `[B, V]` of the next token, and the new cache."""
        ...
