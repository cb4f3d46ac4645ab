"""The objective of supervised fine-tuning."""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.algo.types import Array, Demonstrations, Params
from rlhf_jax.interfaces import TokenLogprobsFn
from rlhf_jax.learner.gradients import Metrics, Objective


def imitation_losses(
    token_logprobs_fn: TokenLogprobsFn,
) -> Callable[[Params, Demonstrations], Array]:
    """Negative log-likelihood of each sequence's target tokens, summed: `[B]`, nats."""

    def losses(params: Params, batch: Demonstrations) -> Array:
        logprobs, _ = token_logprobs_fn(
            params,
            batch.tokens,
            batch.mask,
            response_length=batch.tokens.shape[1] - 1,  # nothing predicts the first
            temperature=1.0,
        )
        return -jnp.sum(jnp.where(batch.target_mask[:, 1:], logprobs, 0.0), axis=1)

    return losses


def imitation_objective(token_logprobs_fn: TokenLogprobsFn) -> Objective:
    """Mean negative log-likelihood of target tokens; the divisor is their number."""
    losses = imitation_losses(token_logprobs_fn)

    def objective(
        params: Params, batch: Demonstrations, num_targets: Array
    ) -> tuple[Array, Metrics]:
        loss = jnp.sum(losses(params, batch)) / num_targets
        return loss, {"loss": loss}

    return objective


def count_targets(batch: Demonstrations) -> Array:
    """Divisor of `imitation_objective`: target tokens, at least 1."""
    return jnp.maximum(jnp.sum(batch.target_mask[:, 1:]), 1).astype(jnp.float32)
