"""This library in `ppo_update.py`: one update per turn."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from networks import draw_prompts, init_params, make_module
from shape import Shape

from rlhf_jax.algo.types import Experience, Params, Prompts, Rollout
from rlhf_jax.learner import (
    ActorCritic,
    TrainState,
    init_train_state,
    make_optimizer,
    make_update,
    ppo_objective,
    separate_networks,
    step_keys,
)
from rlhf_jax.models import Transformer
from rlhf_jax.models.callables import critic, policy, reward_model
from rlhf_jax.rollout import generate, make_experience, score_rollout

PHASES = ("rollout_s", "score_s", "optimize_s")


class Frozen(NamedTuple):
    """Parameters that no update changes."""

    reference: Params
    reward: Params


class Program(NamedTuple):
    """The three compiled functions of an update."""

    rollout: Callable[[TrainState, Prompts], Rollout]
    score: Callable[[TrainState, Frozen, Rollout], Experience]
    update: Callable[[TrainState, Experience], tuple[TrainState, dict]]


def make_program(
    shape: Shape,
    lm: Transformer,
    value: Transformer,
    reward: Transformer,
    optimizers: ActorCritic,
) -> Program:
    """An update with the options that are TRL's defaults, at temperature 1."""
    actor, values_fn, score_fn = policy(lm), critic(value), reward_model(reward)

    @jax.jit
    def rollout(state: TrainState, prompts: Prompts) -> Rollout:
        return generate(
            step_keys(state)[0],
            state.params.actor,
            prompts,
            prefill=actor.prefill,
            decode=actor.decode,
            max_new_tokens=shape.response,
            stop_ids=(),
        )

    @jax.jit
    def score(state: TrainState, frozen: Frozen, rollout: Rollout) -> Experience:
        scored = score_rollout(
            None,  # old log-probabilities are the sampler's, as in TRL
            state.params.critic,
            frozen.reference,
            score_fn(frozen.reward, rollout.tokens, rollout.sequence_mask),
            rollout,
            token_logprobs_fn=actor.token_logprobs,
            values_fn=values_fn,
        )
        return make_experience(scored, kl_coef=state.kl_coef)[0]

    update = make_update(
        ppo_objective(
            separate_networks(
                token_logprobs_fn=actor.token_logprobs, values_fn=values_fn
            )
        ),
        optimizers,
        num_epochs=shape.epochs,
        num_minibatches=shape.minibatches,
    )
    return Program(rollout=rollout, score=score, update=update)


class JaxSide:
    """Four models, the state of the trained ones, and an update per `take_turn`."""

    def __init__(self, shape: Shape):
        keys = jax.random.split(jax.random.key(0), 4)
        lm, value, reward = (make_module(shape, h) for h in ("lm", "value", "reward"))
        optimizers = ActorCritic(
            actor=make_optimizer(3e-6), critic=make_optimizer(3e-6)
        )
        actor = init_params(lm, keys[0])
        self._frozen = Frozen(
            # A copy: the update reuses the actor's own buffers.
            reference=jax.tree.map(jnp.copy, actor),
            reward=init_params(reward, keys[1]),
        )
        self._state = init_train_state(
            keys[2],
            ActorCritic(actor=actor, critic=init_params(value, keys[3])),
            optimizers,
            kl_coef=0.05,
        )
        self._shape = shape
        self._program = make_program(shape, lm, value, reward, optimizers)
        self._random = np.random.default_rng(0)
        jax.block_until_ready((self._state, self._frozen))

    def take_turn(self) -> dict[str, Any]:
        """One update on new prompts, timed as a whole and by phase."""
        steps_before = self._optimizer_steps()
        times = [time.perf_counter()]

        def lap(result):
            jax.block_until_ready(result)
            times.append(time.perf_counter())
            return result

        prompts = draw_prompts(self._random, self._shape)
        rollout = lap(self._program.rollout(self._state, prompts))
        experience = lap(self._program.score(self._state, self._frozen, rollout))
        self._state, metrics = lap(self._program.update(self._state, experience))
        metrics = jax.device_get(metrics)
        end = time.perf_counter()
        if not all(np.isfinite(value) for value in metrics.values()):
            raise RuntimeError(f"an update gave {metrics}")
        return {
            "update_s": end - times[0],
            **dict(zip(PHASES, np.diff(times).tolist(), strict=True)),
            "optimizer_steps": self._optimizer_steps() - steps_before,
            "response_tokens": int(np.asarray(rollout.lengths).sum()),
            "peak_rss_bytes": timing.peak_rss_bytes(),
            "device_peak_bytes": timing.device_peak_bytes(),
        }

    def _optimizer_steps(self) -> int:
        """Steps the optimizers have taken, by their own count."""
        opt_state = self._state.opt_state
        actor = int(optax.tree.get(opt_state.actor, "count"))
        assert actor == int(optax.tree.get(opt_state.critic, "count"))
        return actor
