"""The KL in the loss after the policy has moved, summed over every answer there is.

Tokens were drawn from π_old. What the term should have is the gradient of π's own KL,
in the states that π_old visits.
"""

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    Moved = importlib.import_module("stale_kl").Moved

SEEDS = range(4)
DISTANCES = (0.0, 0.15, 0.4, 1.0)  # of π from π_old, in logits


def errors(distance, **options):
    """Total variation and relative error of the gradient, mean over the tasks."""
    found = []
    for seed in SEEDS:
        case = Moved(seed, distance)
        found.append((case.total_variation, case.gradient_error(**options)))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    "estimator",
    [{"estimator": "k2"}, {"estimator": "k3", "straight_through": True}],
    ids=["k2", "k3, straight-through"],
)
def test_weighted_by_the_ratio_the_gradient_is_exact(distance, estimator):
    _, error = errors(distance, importance_weighted=True, **estimator)
    assert error < 1e-5


def test_unweighted_it_is_exact_only_before_the_policy_moves():
    moved, unweighted = np.transpose(
        [errors(d, importance_weighted=False, estimator="k2") for d in DISTANCES]
    )
    assert moved[0] == 0 and unweighted[0] < 1e-5
    assert np.all(np.diff(unweighted) > 0)
    assert moved[-1] > 0.16 and unweighted[-1] > 0.2
