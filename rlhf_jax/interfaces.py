"""What an algorithm needs from a model: callables of parameters and arrays.

Any model fits that can be called this way; `rlhf_jax.rollout.from_logits` makes all of
these from one function `(params, tokens, mask) -> logits`, and `rlhf_jax.models`
supplies them for its own transformer.

Shapes as in `rlhf_jax.algo.types`. `mask` is `[B, S]` bool, True on real tokens; a
model must give the same answers at real tokens wherever the padding sits.
"""

from typing import Any, Protocol

from rlhf_jax.algo.types import Array, Params, Scalar

Cache = Any  # a pytree that only the model looks into

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the leading axis of every batch is split."""


class LogitsFn(Protocol):
    """Logits of the next token at every position."""

    def __call__(self, params: Params, tokens: Array, mask: Array, /) -> Array:
        """`[B, S]` int32 and bool → `[B, S, V]`; column s predicts token s + 1."""
        ...


class SequenceValuesFn(Protocol):
    """The critic at every position."""

    def __call__(self, params: Params, tokens: Array, mask: Array, /) -> Array:
        """→ `[B, S]`; column s is the value of the text read through token s."""
        ...


class ScoreFn(Protocol):
    """A reward model: one number per sequence."""

    def __call__(self, params: Params, tokens: Array, mask: Array, /) -> Array:
        """→ `[B]` float."""
        ...


class TokenLogprobsFn(Protocol):
    """Log-probability and entropy at the last `response_length` tokens.

    Separate from `LogitsFn` so that a model may compute them without ever holding
    `[B, T, V]`.
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
    """Actor and critic over one sequence: what an update differentiates.

    Two networks (`rlhf_jax.learner.separate_networks`), or one trunk with two heads
    that is run once.
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
    """Reads left-padded prompts and makes room for the answer."""

    def __call__(
        self, params: Params, tokens: Array, mask: Array, /, *, cache_length: int
    ) -> tuple[Array, Cache]:
        """`[B, P]` → logits `[B, V]` of the first response token, and the cache."""
        ...


class DecodeFn(Protocol):
    """Reads one more token per row."""

    def __call__(
        self, params: Params, tokens: Array, cache: Cache, /
    ) -> tuple[Array, Cache]:
        """`[B]` int32 → logits `[B, V]` of the next token, and the new cache."""
        ...
