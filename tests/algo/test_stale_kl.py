"""The KL in the loss after the policy has moved, summed over every answer there is.

Tokens were drawn from π_old. What the term should have is the gradient of π's own KL,
in the states that π_old visits.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import actor_loss
from rlhf_jax.algo.types import Experience
from rlhf_jax.tasks import enumerable

SEEDS = range(4)
DISTANCES = (0.0, 0.15, 0.4, 1.0)  # of π from π_old, in logits


class Moved:
    """A random task, the policy that answered, and where it has moved to."""

    def __init__(self, seed, distance):
        self.task = enumerable.random_task(seed)
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(3, *self.task.ref_logits.shape))
        self.old = np.float32(self.task.ref_logits + noise[0])
        self.new = np.float32(self.old + distance * noise[1])
        logprobs = enumerable.log_softmax(self.old)
        visits = enumerable.state_visits(self.task, self.old)
        gap = np.abs(np.exp(logprobs) - np.exp(enumerable.log_softmax(self.new)))
        self.total_variation = np.average(gap.sum(axis=1) / 2, weights=visits)

    def wanted(self):
        """`[N, V]`: Σ_s d_old(s) ∇KL(π(·|s) ‖ π_ref(·|s)), by its closed form."""
        visits = enumerable.state_visits(self.task, self.old)
        logprobs = enumerable.log_softmax(self.new)
        policy = np.exp(logprobs)
        log_ratio = logprobs - enumerable.log_softmax(self.task.ref_logits)
        mean = (policy * log_ratio).sum(axis=1, keepdims=True)
        return visits[:, None] * policy * (log_ratio - mean)

    def gradient(self, *, importance_weighted, **estimator):
        """`[N, V]`: the expected gradient of the KL term of `actor_loss`."""
        responses = self.task.responses

        def of(logits):
            table = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
            return table[responses.states, responses.tokens]

        probs = np.exp(enumerable.response_logprobs(self.task, self.old))
        experience = Experience(
            mask=jnp.asarray(responses.mask),
            old_logprobs=of(self.old),
            advantages=jnp.zeros(responses.mask.shape),
            ref_logprobs=of(self.task.ref_logits),
            kl_coef=jnp.asarray(probs, jnp.float32),  # the sum is the expectation
        )

        def loss(logits):
            return actor_loss(
                of(logits),
                experience,
                kl_fn=partial(kl_estimate, **estimator),
                importance_weighted_kl=importance_weighted,
                aggregation="token-sum",
            )[0]

        return np.asarray(jax.grad(loss)(jnp.asarray(self.new)), np.float64)


def errors(distance, **options):
    """Total variation and relative error of the gradient, mean over the tasks."""
    found = []
    for seed in SEEDS:
        case = Moved(seed, distance)
        want = case.wanted()
        error = np.linalg.norm(case.gradient(**options) - want) / np.linalg.norm(want)
        found.append((case.total_variation, error))
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
