"""A run without files, for the training loops of `ppo` and `grpo`."""

import jax.numpy as jnp

from rlhf_jax.recipes.scorer import Rewards


class StubRun:
    """Stands for `PolicyRun`: some steps, and rewards by a function of rollouts."""

    is_fresh = False

    def __init__(self, steps, score):
        self._steps = steps
        self._score = score
        self.metrics = []

    def restore(self, state):
        return state

    def evaluate_start(self, state):
        pass

    def steps(self):
        return range(1, self._steps + 1)

    def rewards(self, state, rollout, batch):
        scores = jnp.asarray(self._score(rollout))
        return Rewards(scores=scores, metrics={})

    def finish(self, step, state, metrics, experience, batch):
        assert state.step == step
        self.metrics.append(metrics)
        return state
