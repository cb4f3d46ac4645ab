"""Array aliases, the shape legend and the records that flow from prompts to update.

Shapes: `B` sequences, `P` padded prompt length, `T` padded response length,
`S = P + T`, `V` vocabulary, `D` model width, `M` minibatches, `G` responses per prompt.

Prompts are left-padded and responses right-padded, so that a rollout row is
`pad … pad prompt … prompt response … response pad … pad`. Masks come from lengths and
stop tokens, never from comparing ids with a pad id: pad may equal EOS, and may occur
inside a prompt. Padding may hold anything, NaN included.

Index `t` is response token `t`: `logprobs[:, t]` = log π(a_t | s_t), `values[:, t]` =
V(s_t), the value *before* a_t is chosen, and `rewards[:, t]` is the reward for a_t.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

Array = jax.Array
Scalar = jax.Array | float
Params = Any  # a pytree of arrays

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen, keyword-only dataclass that JAX treats as a pytree."""
    return jax.tree_util.register_dataclass(
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    )


@record
class Prompts:
    """Prompts for the policy."""

    tokens: Array  # [B, P] int32, left-padded
    lengths: Array  # [B] int32, real tokens per row, at least 1

    @property
    def mask(self) -> Array:
        """`[B, P]` bool, True on real tokens."""
        width = self.tokens.shape[1]
        return jnp.arange(width)[None, :] >= width - self.lengths[:, None]


@record
class Rollout:
    """Prompts and sampled responses."""

    prompts: Prompts
    responses: Array  # [B, T] int32, right-padded
    lengths: Array  # [B] int32, response tokens through the first stop token
    truncated: Array  # [B] bool, no stop token before the limit
    logprobs: Array  # [B, T] float32, under the sampling distribution

    @property
    def mask(self) -> Array:
        """`[B, T]` bool, True on response tokens through the first stop token."""
        columns = jnp.arange(self.responses.shape[1])[None, :]
        return columns < self.lengths[:, None]

    @property
    def tokens(self) -> Array:
        """`[B, S]` int32, prompt then response."""
        return jnp.concatenate([self.prompts.tokens, self.responses], axis=1)

    @property
    def sequence_mask(self) -> Array:
        """`[B, S]` bool, True on real tokens of prompt and response."""
        return jnp.concatenate([self.prompts.mask, self.mask], axis=1)


@record
class ScoredRollout:
    """A rollout with the outputs of the four models. No gradient flows through it."""

    rollout: Rollout
    logprobs: Array  # [B, T] float32, of the behavior policy
    ref_logprobs: Array | None  # [B, T] float32, of the frozen reference, if used
    values: Array | None  # [B, T] float32, V(s_t) before response token t, if any
    scores: Array  # [B] float32, one number per sequence
    target_values: Array | None = None  # [B, T] float32, of a slow copy of the critic
    end_values: Array | None = None  # [B] float32, value of the state after column T


@record
class Experience:
    """The training data of an update, per token.

    The losses use the first three and, depending on options, the others. An objective
    that runs a network also needs the sequences.
    """

    mask: Array  # [B, T] bool, True on response tokens
    old_logprobs: Array  # [B, T] float32
    advantages: Array  # [B, T] float32
    old_values: Array | None = None  # [B, T] float32; None: there is no critic
    returns: Array | None = None  # [B, T] float32, the critic's targets
    ref_logprobs: Array | None = None  # [B, T] float32, if the reference was used
    value_mask: Array | None = None  # [B, T] bool, the critic's tokens; None: `mask`
    weights: Array | None = None  # [B, T] float32, of policy terms; None: all 1
    kl_coef: Array | None = None  # [B] float32, β of a KL term in the loss; None: none
    tokens: Array | None = None  # [B, S] int32, prompt then response
    sequence_mask: Array | None = None  # [B, S] bool, True on real tokens


@record
class Sequences:
    """Plain token sequences, padded on either side."""

    tokens: Array  # [B, S] int32
    mask: Array  # [B, S] bool, True on real tokens


@record
class Demonstrations:
    """Sequences for supervised fine-tuning, with a target mask."""

    tokens: Array  # [B, S] int32
    mask: Array  # [B, S] bool, True on real tokens
    target_mask: Array  # [B, S] bool, True on tokens trained on


@record
class Preferences:
    """Pairs of full sequences, the first one preferred."""

    chosen: Sequences  # [N, S]
    rejected: Sequences  # [N, S]
    margin: Array | None = None  # [N] float32, target score difference


@record
class Rankings:
    """Ranked full sequences, up to K per prompt."""

    answers: Sequences  # [N, K, S], from best to worst
    grades: Array  # [N, K] float32, higher is better, descending; equal is a tie
    mask: Array  # [N, K] bool, True on real responses
