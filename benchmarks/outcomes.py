"""Stationary points of methods, compared with the optimum of their objective."""

import dataclasses
from typing import Any

import numpy as np
from stationary_points import stationary_point

from rlhf_jax.algo.options import (
    AdvantageOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
)
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.tasks import enumerable
from rlhf_jax.tasks.enumerable import EnumerableTask

PLAIN = PPOMethod()  # every response keeps its score
FINED = PPOMethod(scores=ScoreOptions(missing_eos="subtract"))  # or loses 1
CHANGES: dict[str, PPOMethod] = {
    "none": PLAIN,
    "λ = 0": dataclasses.replace(PLAIN, advantages=AdvantageOptions(lam=0.0)),
    "length-adaptive λ, α = 1": dataclasses.replace(
        PLAIN, advantages=AdvantageOptions(lam_alpha=1.0)
    ),
    "each response divided by its length": dataclasses.replace(
        PLAIN, policy_loss=PolicyLossOptions(aggregation="seq-mean-token-mean")
    ),
    "γ = 0.9": dataclasses.replace(PLAIN, advantages=AdvantageOptions(gamma=0.9)),
    "token rewards whitened": dataclasses.replace(
        PLAIN, scores=ScoreOptions(whiten_rewards=True)
    ),
    "responses without a stop masked": dataclasses.replace(
        PLAIN, scores=ScoreOptions(missing_eos="mask")
    ),
    "k2 in the reward": dataclasses.replace(PLAIN, kl=KLOptions(estimator="k2")),
    "k3 in the reward": dataclasses.replace(PLAIN, kl=KLOptions(estimator="k3")),
    "k3 in the reward, clamps 20 and 10": dataclasses.replace(
        PLAIN, kl=KLOptions(estimator="k3", log_ratio_clamp=20.0, clamp=10.0)
    ),
    "k2 in the loss, not whitened": dataclasses.replace(
        PLAIN,
        kl=KLOptions(place="loss", estimator="k2"),
        advantages=AdvantageOptions(whiten="none"),
    ),
    "k2 in the loss, whitened": dataclasses.replace(
        PLAIN, kl=KLOptions(place="loss", estimator="k2")
    ),
    "k3 in the loss, not whitened": dataclasses.replace(
        PLAIN,
        kl=KLOptions(place="loss", estimator="k3"),
        advantages=AdvantageOptions(whiten="none"),
    ),
    "k3 in the loss, whitened": dataclasses.replace(
        PLAIN, kl=KLOptions(place="loss", estimator="k3")
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A stationary point and the optimum of J(π) = E[r] − β · KL(π ‖ π_ref)."""

    own_share: float  # of what can be gained over the reference, by the method's own r
    share: float  # the same by the scores as they are
    own_distance: float  # total variation to the optimum by the method's own r
    distance: float  # the same by the scores as they are
    score: float  # E[r], of the scores as they are
    kl: float  # nats
    truncated: float  # share of responses without a stop token
    answers: float  # how many there are in effect, the exponential of the entropy
    steps: int


def outcome(
    task: EnumerableTask,
    method: PPOMethod,
    *,
    beta: float,
    end_values: np.ndarray | None = None,
    **options: Any,
) -> Outcome:
    """See `Outcome` and `stationary_point`; all in float64, without the library."""
    point = stationary_point(task, method, beta=beta, end_values=end_values, **options)
    probs = point.probs
    ref_logprobs = enumerable.response_logprobs(task, task.ref_logits)
    ref = np.exp(ref_logprobs)
    logprobs = np.log(np.where(probs == 0, 1.0, probs))
    kl = float(probs @ (logprobs - ref_logprobs))

    def compare(scores: np.ndarray) -> tuple[float, float]:
        log_best = enumerable.log_softmax(ref_logprobs + scores / beta)
        best = np.exp(log_best)
        gain = probs @ scores - beta * kl - ref @ scores
        most = best @ scores - beta * best @ (log_best - ref_logprobs) - ref @ scores
        return float(gain / most), float(np.abs(probs - best).sum() / 2)

    own_share, own_distance = compare(own_scores(task, method, end_values))
    share, distance = compare(task.scores)
    return Outcome(
        own_share=own_share,
        share=share,
        own_distance=own_distance,
        distance=distance,
        score=float(probs @ task.scores),
        kl=kl,
        truncated=float(probs[task.responses.truncated].sum()),
        answers=float(np.exp(-probs @ logprobs)),
        steps=point.steps,
    )


def own_scores(
    task: EnumerableTask, method: PPOMethod, end_values: np.ndarray | None = None
) -> np.ndarray:
    """`[K]`: the r for which the method maximizes E[r] − β · KL, derived by hand."""
    scores, options = task.scores, method.scores
    truncated = task.responses.truncated
    if options.normalization == "reference":
        ref = np.exp(enumerable.response_logprobs(task, task.ref_logits))
        mean = ref @ scores
        scores = (scores - mean) / np.sqrt(ref @ (scores - mean) ** 2)
    if options.missing_eos == "replace":
        scores = np.where(truncated, options.missing_eos_penalty, scores)
    if options.missing_eos == "subtract":
        scores = np.where(truncated, scores - options.missing_eos_penalty, scores)
    if options.end_value == "kept" and end_values is not None:
        # The last token bootstraps from an end that is never trained; a response that
        # fills all T columns has no such state.
        lam = method.advantages.lam
        mixed = lam * scores + (1 - lam) * end_values
        scores = np.where(task.responses.lengths < task.max_steps, mixed, scores)
    return scores


def changed_outcome(task: EnumerableTask, method: PPOMethod, *, beta: float) -> Outcome:
    """Uses small steps where an estimate grows steeply."""
    steep = method.kl.estimator == "k3" or method.kl == KLOptions(estimator="k2")
    rate = 0.1 if steep else 0.5
    return outcome(task, method, beta=beta, rate=rate)
