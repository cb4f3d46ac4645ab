"""The differentiated function of reward models."""

import jax.numpy as jnp

from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.types import Array, Params, Preferences
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.learner.gradients import Metrics, Objective


def preference_objective(
    score_fn: ScoreFn, *, label_smoothing: float = 0.0, center_coef: float = 0.0
) -> Objective:
    """Bradley–Terry loss of a reward model; the divisor counts pairs.

    Args:
        score_fn: of the reward model.
        label_smoothing: assumed probability that a judgement is flipped.
        center_coef: weight of ½(chosen + rejected)², which only pairs' differences
            leave free; keeps scores near 0.
    """

    def objective(
        params: Params, batch: Preferences, num_pairs: Array
    ) -> tuple[Array, Metrics]:
        # One pass over both halves: one large product instead of two small ones.
        tokens = jnp.concatenate([batch.chosen.tokens, batch.rejected.tokens])
        mask = jnp.concatenate([batch.chosen.mask, batch.rejected.mask])
        chosen, rejected = jnp.split(score_fn(params, tokens, mask), 2)
        losses = preference_loss(chosen, rejected, label_smoothing=label_smoothing)
        losses = losses + center_coef * 0.5 * (chosen + rejected) ** 2
        loss = jnp.sum(losses) / num_pairs
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum((chosen > rejected).astype(jnp.float32)) / num_pairs,
            "margin": jnp.sum(chosen - rejected) / num_pairs,
            "score_mean": 0.5 * jnp.sum(chosen + rejected) / num_pairs,
        }
        return loss, metrics

    return objective
