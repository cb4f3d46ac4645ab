"""A rollout, and what actor, critic, reference and reward model say of it."""

import jax

from rlhf_jax.algo.types import Params, Rollout, Scalar, ScoredRollout
from rlhf_jax.interfaces import ScoreFn, TokenLogprobsFn, ValuesFn


def score_rollout(
    actor: Params | None,
    critic: Params,
    reference: Params,
    reward: Params,
    rollout: Rollout,
    *,
    token_logprobs_fn: TokenLogprobsFn,
    values_fn: ValuesFn,
    score_fn: ScoreFn,
    temperature: Scalar = 1.0,
) -> ScoredRollout:
    """Old and reference log-probabilities, values and scores of one rollout.

    Args:
        actor: parameters to recompute the old log-probabilities with; None keeps the
            sampler's. They agree within rounding when sampler and trainer run in
            float32 and the sampler only divided by the temperature.
        critic: parameters of `values_fn`.
        reference: parameters of `token_logprobs_fn`, frozen.
        reward: parameters of `score_fn`, frozen.
        rollout: answers sampled at `temperature`.
        token_logprobs_fn: of actor and reference.
        values_fn: of the critic.
        score_fn: reads prompt and answer through the first stop token.
        temperature: the sampler's; the same for actor and reference, or the KL
            between two equal models is not zero.

    Returns:
        The record, without gradient. Entries past the end of an answer are whatever
        the models said of padding.
    """
    response_length = rollout.responses.shape[1]
    tokens, mask = rollout.tokens, rollout.sequence_mask

    def logprobs_of(params: Params):
        return token_logprobs_fn(
            params,
            tokens,
            mask,
            response_length=response_length,
            temperature=temperature,
        )[0]

    return jax.lax.stop_gradient(
        ScoredRollout(
            rollout=rollout,
            logprobs=rollout.logprobs if actor is None else logprobs_of(actor),
            ref_logprobs=logprobs_of(reference),
            values=values_fn(critic, tokens, mask, response_length=response_length),
            scores=score_fn(reward, tokens, mask),
        )
    )
