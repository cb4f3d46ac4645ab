"""The objectives of reward models, for pairs and for full rankings."""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.algo.preferences import preference_loss
from rlhf_jax.algo.types import Array, Params, Preferences, Rankings
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.learner.gradients import Metrics, Objective

RankingLossFn = Callable[[Array, Rankings], Array]
"""`(scores [N, K], batch) -> losses [N]`."""


def preference_objective(
    score_fn: ScoreFn, *, label_smoothing: float = 0.0, center_coef: float = 0.0
) -> Objective:
    """Bradley–Terry loss of a reward model; the divisor counts pairs.

    Uses the margins of the batch, if any.

    Args:
        score_fn: of the reward model.
        label_smoothing: assumed probability that a judgement is flipped.
        center_coef: weight of ½(chosen + rejected)², which the loss does not determine;
            keeps scores near 0.
    """

    def objective(
        params: Params, batch: Preferences, num_pairs: Array
    ) -> tuple[Array, Metrics]:
        # One pass over both halves: one large product instead of two small ones.
        tokens = jnp.concatenate([batch.chosen.tokens, batch.rejected.tokens])
        mask = jnp.concatenate([batch.chosen.mask, batch.rejected.mask])
        chosen, rejected = jnp.split(score_fn(params, tokens, mask), 2)
        losses = preference_loss(
            chosen, rejected, margin=batch.margin, label_smoothing=label_smoothing
        )
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


def ranking_objective(
    score_fn: ScoreFn, loss_fn: RankingLossFn, *, center_coef: float = 0.0
) -> Objective:
    """A loss of full rankings; the divisor counts rankings, with equal weight.

    The responses to a prompt are scored together, each once. Metrics are means over the
    pairs of a ranking, then over rankings: with two responses each they equal those of
    `preference_objective`.

    Args:
        score_fn: of the reward model.
        loss_fn: `[N]` losses from `[N, K]` scores and their batch.
        center_coef: weight of 2·mean², with the mean score of a ranking, which the loss
            does not determine; with two responses this is ½(chosen + rejected)².
    """

    def objective(
        params: Params, batch: Rankings, num_rankings: Array
    ) -> tuple[Array, Metrics]:
        num_rows, num_answers, width = batch.answers.tokens.shape
        # Padding responses are scored, too. A sequence without a real token would give
        # NaN, and NaN · 0 in its gradient.
        readable = batch.answers.mask | ~batch.mask[:, :, None]
        scores = score_fn(
            params,
            batch.answers.tokens.reshape(-1, width),
            readable.reshape(-1, width),
        ).reshape(num_rows, num_answers)
        mean = _mean(scores, batch.mask, axis=1)
        losses = loss_fn(scores, batch) + center_coef * 2.0 * mean**2
        loss = jnp.sum(losses) / num_rankings

        gaps = scores[:, :, None] - scores[:, None, :]  # [N, K, K], row over column
        is_pair = batch.mask[:, :, None] & batch.mask[:, None, :]
        is_pair &= batch.grades[:, :, None] > batch.grades[:, None, :]
        right = (gaps > 0.0).astype(jnp.float32)
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum(_mean(right, is_pair, axis=(1, 2))) / num_rankings,
            "margin": jnp.sum(_mean(gaps, is_pair, axis=(1, 2))) / num_rankings,
            "score_mean": jnp.sum(mean) / num_rankings,
        }
        return loss, metrics

    return objective


def _mean(x: Array, where: Array, *, axis: int | tuple[int, ...]) -> Array:
    """Mean where `where` is True; 0 if empty."""
    count = jnp.sum(where, axis=axis, dtype=jnp.float32)
    return jnp.sum(jnp.where(where, x, 0.0), axis=axis) / jnp.maximum(count, 1.0)


def count_pairs(batch: Preferences) -> Array:
    """Divisor of `preference_objective`."""
    return jnp.asarray(batch.chosen.tokens.shape[0], jnp.float32)


def count_rankings(batch: Rankings) -> Array:
    """Divisor of `ranking_objective`."""
    return jnp.asarray(batch.grades.shape[0], jnp.float32)
