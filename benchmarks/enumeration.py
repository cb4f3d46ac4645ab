"""Bias and stationary points: the tables of docs/what-is-unbiased.md.

    python benchmarks/enumeration.py

On a language of 121 responses every expectation is a sum: `expected_gradients.py` sums
gradients, `stationary_points.py` follows them to convergence. Nothing is sampled: the
numbers are properties of the formulas, exact to float32 (printed as 0), and do not
depend on the machine.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from expected_gradients import (
    BETA,
    Case,
    advantage_result,
    cosine,
    error_of_direction,
    exact_advantages,
    kl_loss_gradient,
    kl_result,
    per_state_kl_gradient,
    relative_error,
    token_mean_gradient,
    whitened_gradient,
    whole_answer_k2_gradient,
    wrong_critic,
)
from outcomes import CHANGES, FINED, PLAIN, Outcome, changed_outcome, outcome
from stale_kl import Moved

from rlhf_jax.algo.options import AdvantageOptions
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.tasks import enumerable

SEEDS = range(5)
TASKS = range(3)  # of the stationary points
NEAR, FAR = 0.1, 1.0  # distance of the policy, in the reference's logits

KL_ESTIMATORS: dict[str, dict] = {
    "k1": {"estimator": "k1"},
    "k2": {"estimator": "k2"},
    "k3": {"estimator": "k3"},
    "abs": {"estimator": "abs"},
    "k1, straight-through": {"estimator": "k1", "straight_through": True},
    "k3, straight-through": {"estimator": "k3", "straight_through": True},
    "k1 within ±10": {"estimator": "k1", "clamp": 10.0},
    "k1 within ±1": {"estimator": "k1", "clamp": 1.0},
    "k3, ℓ within ±20, k3 within ±10": {
        "estimator": "k3",
        "log_ratio_clamp": 20.0,
        "clamp": 10.0,
    },
    "k3 within ±1": {"estimator": "k3", "clamp": 1.0},
}

ESTIMATORS = {
    "TD error (λ = 0)": AdvantageOptions(lam=0.0),
    "2-step": AdvantageOptions(n_steps=2),
    "3-step": AdvantageOptions(n_steps=3),
    "GAE, λ = 0.5": AdvantageOptions(lam=0.5),
    "GAE, λ = 0.9": AdvantageOptions(lam=0.9),
    "GAE, λ = 0.95": AdvantageOptions(lam=0.95),
    "GAE, λ = 0.95, critic's λ = 1": AdvantageOptions(lam=0.95, value_lam=1.0),
    "Monte Carlo − V (λ = 1)": AdvantageOptions(lam=1.0),
    "length-adaptive λ, α = 1": AdvantageOptions(lam_alpha=1.0),
}

CRITICS: dict[str, Callable[[Case], np.ndarray]] = {
    "exact": lambda case: case.values,
    "off by 0.5": lambda case: wrong_critic(case, 0.5),
    "V = 0": lambda case: np.zeros_like(case.values),
}


def main() -> None:
    """Prints every table, in Markdown."""
    jax.config.update("jax_platforms", "cpu")  # nothing here is large
    for heading, table in TABLES.items():
        print(f"### {heading}\n")
        rows = [[str(cell) for cell in row] for row in table()]
        for number, row in enumerate(rows):
            print(f"| {' | '.join(row)} |")
            if number == 0:
                print("|---" * len(row) + "|")
        print(flush=True)


# ---- the tables ----

Rows = Iterable[Sequence[object]]


def kl_rows(distance: float) -> Rows:
    """Every estimator, at this distance from the reference."""
    cases = [Case(seed, distance=distance) for seed in SEEDS]
    yield (
        f"KL = {mean(case.kl for case in cases):.2g} nats",
        "value: error",
        "standard deviation / KL",
        "in the loss: error of the gradient",
        "cosine",
        "in the reward: error of the gradient",
    )
    for estimator, options in KL_ESTIMATORS.items():
        results = [kl_result(case, **options) for case in cases]
        yield (
            estimator,
            percent(mean(r.value_error for r in results)),
            number(mean(r.value_noise for r in results)),
            percent(mean(r.loss_error for r in results)),
            number(mean(r.loss_cosine for r in results), 3),
            percent(mean(r.reward_error for r in results)),
        )


def kl_length_rows() -> Rows:
    """What token-wise k2 in the loss omits, by response length."""
    yield (
        "tokens per response",
        "KL per response, nats",
        "token-wise k2: error to ∇KL of responses",
        "cosine",
        "the same, to the KL of states",
        "k2 of the response: error to ∇KL of responses",
    )
    for limit in (1, 2, 4, 8):
        cases = long_answer_cases(limit)
        found = [
            (
                case,
                kl_loss_gradient(case, estimator="k2"),
                whole_answer_k2_gradient(case),
            )
            for case in cases
        ]
        yield (
            f"{mean(float(case.probs @ case.responses.lengths) for case in cases):.1f}",
            f"{mean(case.kl for case in cases):.2f}",
            percent(
                mean(relative_error(k2, case.kl_gradient) for case, k2, _ in found)
            ),
            f"{mean(cosine(k2, case.kl_gradient) for case, k2, _ in found):.3f}",
            percent(
                mean(
                    relative_error(k2, per_state_kl_gradient(case))
                    for case, k2, _ in found
                )
            ),
            percent(
                mean(
                    relative_error(whole, case.kl_gradient) for case, _, whole in found
                )
            ),
        )


def stale_kl_rows() -> Rows:
    """A KL in the loss once the policy has moved from the behavior policy."""
    terms: dict[str, dict[str, Any]] = {
        "k2": {"estimator": "k2"},
        "k3": {"estimator": "k3"},
        "k2, weighted by π / π_old": {"estimator": "k2", "importance_weighted": True},
    }
    yield "total variation between π and π_old", *terms
    for distance in (0.0, 0.15, 0.35, 0.8):
        cases = [Moved(seed, distance) for seed in SEEDS]
        yield (
            f"{mean(case.total_variation for case in cases):.2f}",
            *(
                percent(mean(case.gradient_error(**term) for case in cases))
                for term in terms.values()
            ),
        )


def long_answer_cases(limit: int) -> list[Case]:
    """Three tokens, and a reference that hardly ever stops before the limit."""
    sizes = {"vocabulary_size": 3, "max_steps": limit, "stop_logit": -4.0}
    return [Case(seed, **sizes) for seed in SEEDS]


def advantage_rows() -> Rows:
    """Bias and variance of every estimator under every critic."""
    cases = [Case(seed) for seed in SEEDS]
    yield (
        "",
        *(f"bias, critic {name}" for name in CRITICS),
        *(f"variance, critic {name}" for name in CRITICS),
        *(f"target's bias, critic {name}" for name in CRITICS if name != "exact"),
    )
    for estimator, options in ESTIMATORS.items():
        results = {
            name: [advantage_result(case, options, critic(case)) for case in cases]
            for name, critic in CRITICS.items()
        }
        yield (
            estimator,
            *(percent(mean(r.bias for r in results[name])) for name in CRITICS),
            *(f"{mean(r.variance for r in results[name]):.1f}" for name in CRITICS),
            *(
                number(mean(r.target_bias for r in results[name]), 3)
                for name in CRITICS
                if name != "exact"
            ),
        )


def slow_critic_rows() -> Rows:
    """Bias with a slow critic, where either or both are off by 0.5."""
    cases = [Case(seed) for seed in SEEDS]
    yield "λ", "only the critic is off", "only its slow copy", "both, by the same"
    for lam in (0.0, 0.5, 0.95, 1.0):
        options = AdvantageOptions(lam=lam)
        cells = []
        for critic_error, slow_error in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
            results = [
                advantage_result(
                    case,
                    options,
                    wrong_critic(case, critic_error),
                    wrong_critic(case, slow_error),
                )
                for case in cases
            ]
            cells.append(percent(mean(r.bias for r in results)))
        yield lam, *cells


def reduction_rows() -> Rows:
    """Direction of the expected gradient of exact advantages, and of a constant."""
    cases = [Case(seed) for seed in SEEDS]
    yield "divisor", "error of direction", "cosine", "a constant advantage adds"

    def row(name: str, gradient_of: Callable[[Case, np.ndarray], np.ndarray]):
        errors, cosines, constants = [], [], []
        for case in cases:
            advantages = exact_advantages(case)
            gradient = gradient_of(case, advantages)
            weights = np.where(case.responses.mask, case.probs[:, None], 0.0)
            deviation = np.sqrt(np.average(advantages**2, weights=weights))
            constant = gradient_of(case, np.full_like(advantages, deviation))
            errors.append(error_of_direction(gradient, case.gradient))
            cosines.append(cosine(gradient, case.gradient))
            constants.append(np.linalg.norm(constant) / np.linalg.norm(gradient))
        return (
            name,
            percent(mean(errors)),
            f"{mean(cosines):.4f}",
            percent(mean(constants)),
        )

    def of_one_answer(mode: str) -> Callable[[Case, np.ndarray], np.ndarray]:
        return lambda case, advantages: case.expected_gradient(
            case.policy_gradients(advantages, mode)
        )

    def of_batch(size: int) -> Callable[[Case, np.ndarray], np.ndarray]:
        return lambda case, advantages: token_mean_gradient(
            case, case.policy_gradients(advantages), size
        )

    yield row("none, or the number of responses", of_one_answer("token-sum"))
    for size in (4, 16, 64, 256):
        yield row(f"tokens of a batch of {size}", of_batch(size))
    yield row("tokens of the response", of_one_answer("seq-mean-token-mean"))


def whitening_rows() -> Rows:
    """Error of direction of batches whose advantages are whitened per batch."""
    yield "responses in the batch", "not whitened", "scaled", "scaled and centred"
    for size in (2, 4, 8):
        errors = np.mean([whitening_errors(case, size) for case in tiny_cases()], 0)
        yield size, *(percent(error) for error in errors)


def tiny_cases() -> list[Case]:
    """15 responses of up to three tokens, so that whole batches can be listed."""
    return [Case(seed, vocabulary_size=3, max_steps=3) for seed in SEEDS]


def whitening_errors(case: Case, size: int) -> list[float]:
    """Without whitening, with the scale alone, and with scale and centre."""
    advantages = exact_advantages(case)
    gradients = [
        token_mean_gradient(case, case.policy_gradients(advantages), size),
        whitened_gradient(case, advantages, size, center=False),
        whitened_gradient(case, advantages, size, center=True),
    ]
    return [error_of_direction(gradient, case.gradient) for gradient in gradients]


def preset_rows() -> Rows:
    """Where every preset stops, at one β."""
    yield (
        "",
        "share of its own optimum",
        "distance to it",
        "share of J*",
        "E[r]",
        "KL, nats",
        "without a stop",
        "effective responses",
    )
    tasks = [enumerable.random_task(seed) for seed in TASKS]
    methods = {"PPOMethod()": PLAIN, 'the same, missing_eos="subtract"': FINED}
    methods |= {name: make() for name, make in PPO_PRESETS.items()}
    for name, method in methods.items():
        yield outcome_row(name, [outcome(x, method, beta=BETA) for x in tasks])
    untrained = [
        outcome(
            task,
            PPO_PRESETS["deepspeed_chat"](),
            beta=BETA,
            end_values=np.zeros_like(task.scores),
        )
        for task in tasks
    ]
    yield outcome_row("deepspeed_chat, V = 0 at the end", untrained)


def change_rows() -> Rows:
    """Stationary points with one option changed; every response keeps its score."""
    yield (
        "changed in `PPOMethod()`",
        "share of J*",
        "distance",
        "E[r]",
        "KL, nats",
        "without a stop",
        "effective responses",
    )
    tasks = [enumerable.random_task(seed) for seed in TASKS]
    for name, method in CHANGES.items():
        found = [changed_outcome(task, method, beta=BETA) for task in tasks]
        row = outcome_row(name, found)
        yield row[0], *row[3:4], percent(mean(x.distance for x in found)), *row[4:]


def outcome_row(name: str, found: list[Outcome]) -> Sequence[str]:
    """Means over tasks."""
    return (
        name,
        percent(mean(x.own_share for x in found)),
        percent(mean(x.own_distance for x in found)),
        percent(mean(x.share for x in found)),
        number(mean(x.score for x in found)),
        number(mean(x.kl for x in found)),
        percent(mean(x.truncated for x in found)),
        number(mean(x.answers for x in found), 1),
    )


TABLES: dict[str, Callable[[], Rows]] = {
    "KL estimators, near the reference": functools.partial(kl_rows, NEAR),
    "KL estimators, far from it": functools.partial(kl_rows, FAR),
    "k2 in the loss, by length": kl_length_rows,
    "A KL in the loss after the first step": stale_kl_rows,
    "Advantage estimators": advantage_rows,
    "A slow critic": slow_critic_rows,
    "Reduction": reduction_rows,
    "Whitening": whitening_rows,
    "Presets": preset_rows,
    "One option changed": change_rows,
}


# ---- cells ----


def mean(numbers: Iterable[float]) -> float:
    """Over seeds or tasks."""
    return float(np.mean(list(numbers)))


def percent(x: float) -> str:
    """Below 0.001 % is float32 rounding, shown as 0."""
    if math.isnan(x):
        return "–"
    if abs(x) < 1e-5:
        return "0"
    return f"{100 * x:.1f} %" if abs(x) > 1e-3 else f"{100 * x:.3f} %"


def number(x: float, digits: int = 2) -> str:
    """A dash for missing values."""
    if math.isnan(x):
        return "–"
    return "0" if abs(x) < 1e-5 else f"{x:.{digits}f}"


if __name__ == "__main__":
    main()
