"""Adds log-probabilities, values and scores to a rollout."""

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
    """Computes old and reference log-probabilities and values of a rollout.

    Args:
        actor: parameters to recompute the old log-probabilities; None keeps the
            sampler's. They agree up to rounding if sampler and trainer run in float32
            and the sampler only applies the temperature.
        critic: parameters of `values_fn`; None: no critic.
        reference: parameters of `token_logprobs_fn`, frozen; None: no reference.
        scores: `[B]` float, one per response, from a reward model on prompt and
            response up to and including the first stop token, or from any other source.
        rollout: responses sampled at `temperature`.
        token_logprobs_fn: of actor and reference.
        values_fn: of the critic; None: no critic.
        temperature: the sampler's; the same for actor and reference, otherwise the KL
            between equal models is not zero.
        slow_critic: parameters of `values_fn` for `target_values`.
        with_end_values: also compute the critic's value (the slow critic's, if used) of
            the state after column T, which takes one more column.

    Returns:
        The record, without gradient. Entries after the end of a response are the
        models' outputs on padding.
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

    # V(s_t) is the value before token t: a column of padding adds V(s_T).
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
    """Marks where responses stop in a rollout that was sampled to its limit.

    All its tokens stay real and are trained on; the mask marks where a response ended.
    This is how lm-human-preferences treats responses of fixed length.

    Args:
        rollout: sampled with no stop tokens.
        stop_ids: tokens that would have ended a response.

    Returns:
        The rollout with `truncated` True for rows without one, and the `[B, T]` bool
        mask of tokens up to and including the first stop token: the reward model's
        input.
    """
    mask = response_mask(rollout.responses, stop_ids=stop_ids)
    stops = jnp.asarray(tuple(stop_ids), rollout.responses.dtype)[None, None, :]
    hit = (rollout.responses[:, :, None] == stops).any(axis=(1, 2))
    return dataclasses.replace(rollout, truncated=~hit), mask
