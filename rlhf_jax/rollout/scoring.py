"""A rollout, and what actor, critic and reference say of it beside its scores."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.algo.masking import response_mask
from rlhf_jax.algo.types import Array, Params, Rollout, Scalar, ScoredRollout
from rlhf_jax.interfaces import TokenLogprobsFn, ValuesFn


def score_rollout(
    actor: Params | None,
    critic: Params | None,
    reference: Params | None,
    scores: Array,
    rollout: Rollout,
    *,
    token_logprobs_fn: TokenLogprobsFn,
    values_fn: ValuesFn | None,
    temperature: Scalar = 1.0,
    slow_critic: Params | None = None,
    with_end_values: bool = False,
) -> ScoredRollout:
    """Old and reference log-probabilities and values of one rollout, with its scores.

    Args:
        actor: parameters to recompute the old log-probabilities with; None keeps the
            sampler's. They agree within rounding when sampler and trainer run in
            float32 and the sampler only divided by the temperature.
        critic: parameters of `values_fn`; None where there is no critic.
        reference: parameters of `token_logprobs_fn`, frozen; None: there is none.
        scores: `[B]` float, one number per answer, of a reward model that reads prompt
            and answer through the first stop token, or of anything else.
        rollout: answers sampled at `temperature`.
        token_logprobs_fn: of actor and reference.
        values_fn: of the critic; None: there is none.
        temperature: the sampler's; the same for actor and reference, or the KL
            between two equal models is not zero.
        slow_critic: parameters of `values_fn` for `target_values`.
        with_end_values: also ask the critic (the slow one, where there is one) for the
            value of the state after column T, at the price of one column more.

    Returns:
        The record, without gradient. Entries past the end of an answer are whatever
        the models said of padding.
    """
    response_length = rollout.responses.shape[1]
    tokens, mask = rollout.tokens, rollout.sequence_mask

    def logprobs_of(params: Params) -> Array:
        return token_logprobs_fn(
            params,
            tokens,
            mask,
            response_length=response_length,
            temperature=temperature,
        )[0]

    # V(s_t) is read before token t: a column of padding makes room for V(s_T).
    extra = 1 if with_end_values else 0
    widen = ((0, 0), (0, extra))

    def values_of(
        values_fn: ValuesFn, params: Params | None
    ) -> tuple[Array, Array | None]:
        values = values_fn(
            params,
            jnp.pad(tokens, widen),
            jnp.pad(mask, widen),
            response_length=response_length + extra,
        )
        end = values[:, -1] if with_end_values else None
        return values[:, :response_length], end

    values = end_values = target_values = None
    if values_fn is not None:
        values, end_values = values_of(values_fn, critic)
    if values_fn is not None and slow_critic is not None:
        target_values, end_values = values_of(values_fn, slow_critic)
    return jax.lax.stop_gradient(
        ScoredRollout(
            rollout=rollout,
            logprobs=rollout.logprobs if actor is None else logprobs_of(actor),
            ref_logprobs=None if reference is None else logprobs_of(reference),
            values=values,
            scores=scores,
            target_values=target_values,
            end_values=end_values,
        )
    )


def mark_stops(rollout: Rollout, stop_ids: Sequence[int]) -> tuple[Rollout, Array]:
    """A rollout that was sampled to its limit, as one whose answers stop inside it.

    All its tokens stay real and are trained on; what tells where an answer ended is
    the mask. That is how lm-human-preferences treats answers of fixed length.

    Args:
        rollout: sampled with no stop tokens.
        stop_ids: tokens that would have ended an answer.

    Returns:
        The rollout with `truncated` True where none of them came, and the `[B, T]`
        bool mask of tokens through the first that did: what the reward model reads.
    """
    mask = response_mask(rollout.responses, stop_ids=stop_ids)
    stops = jnp.asarray(tuple(stop_ids), rollout.responses.dtype)[None, None, :]
    hit = (rollout.responses[:, :, None] == stops).any(axis=(1, 2))
    return dataclasses.replace(rollout, truncated=~hit), mask
