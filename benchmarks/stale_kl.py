"""The KL in the loss after the policy has moved, summed over all responses.

Tokens are sampled from π_old. The term should have the gradient of π's KL in the states
that π_old visits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.losses import actor_loss
from rlhf_jax.algo.types import Array, Experience
from rlhf_jax.tasks import enumerable


class Moved:
    """A random task, the behavior policy, and the policy after moving."""

    def __init__(self, seed: int, distance: float):
        """Everything is determined by the seed; `distance` is between their logits."""
        self.task = enumerable.random_task(seed)
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(3, *self.task.ref_logits.shape))
        self.old = (self.task.ref_logits + noise[0]).astype(np.float32)
        self.new = (self.old + distance * noise[1]).astype(np.float32)
        logprobs = enumerable.log_softmax(self.old)
        visits = enumerable.state_visits(self.task, self.old)
        gap = np.abs(np.exp(logprobs) - np.exp(enumerable.log_softmax(self.new)))
        self.total_variation = np.average(gap.sum(axis=1) / 2, weights=visits)

    def wanted(self) -> np.ndarray:
        """`[N, V]`: Σ_s d_old(s) ∇KL(π(·|s) ‖ π_ref(·|s)), by its closed form."""
        visits = enumerable.state_visits(self.task, self.old)
        logprobs = enumerable.log_softmax(self.new)
        policy = np.exp(logprobs)
        log_ratio = logprobs - enumerable.log_softmax(self.task.ref_logits)
        mean = (policy * log_ratio).sum(axis=1, keepdims=True)
        return visits[:, None] * policy * (log_ratio - mean)

    def gradient(
        self, *, importance_weighted: bool = False, **estimator: Any
    ) -> np.ndarray:
        """`[N, V]`: the expected gradient of the KL term of `actor_loss`."""
        responses = self.task.responses

        def of(logits: Any) -> Array:
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

        def loss(logits: Array) -> Array:
            return actor_loss(
                of(logits),
                experience,
                kl_fn=partial(kl_estimate, **estimator),
                importance_weighted_kl=importance_weighted,
                aggregation="token-sum",
            )[0]

        return np.asarray(jax.grad(loss)(jnp.asarray(self.new)), np.float64)

    def gradient_error(self, **options: Any) -> float:
        """‖g − wanted‖ / ‖wanted‖; the options are those of `gradient`."""
        want = self.wanted()
        found = self.gradient(**options) - want
        return float(np.linalg.norm(found) / np.linalg.norm(want))
