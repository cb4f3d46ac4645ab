"""Everything that changes during training, and nothing else: what a checkpoint holds.

States hold arrays only. Apply functions and optimizers are code and are passed to the
functions that need them: two `optax.adam(1e-5)` never compare equal, so a state that
held one would be compiled for again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.scores import ScoreMoments, init_score_moments
from rlhf_jax.algo.types import Array, Params, record


@record
class ActorCritic:
    """One thing for the actor and one for the critic: parameters, or optimizers."""

    actor: Any
    critic: Any


@record
class TrainState:
    """State of PPO and its relatives, without the frozen reference and reward model."""

    params: ActorCritic
    opt_state: ActorCritic
    kl_coef: Array  # [] float32, β of the per-token KL penalty
    score_moments: ScoreMoments  # of the scores so far, or of the reference's
    slow_critic: Params | None  # a copy of the critic that trails it, if there is one
    old_policy: Params | None  # the actor that answers, where that is an older one
    key: Array  # [] PRNG key of the run; folded with `step`, never replaced
    step: Array  # [] int32, updates completed


@record
class ModelState:
    """State of a stage that trains one model."""

    params: Params
    opt_state: optax.OptState
    key: Array  # [] PRNG key of the run
    step: Array  # [] int32, optimizer steps completed


def init_train_state(
    key: Array,
    params: ActorCritic,
    optimizers: ActorCritic,
    *,
    kl_coef: float,
    slow_critic: bool = False,
    old_policy: bool = False,
) -> TrainState:
    """State before the first update.

    Args:
        key: typed PRNG key, kept as the root of all randomness of the run.
        params: parameters of actor and critic; without a critic, an empty dictionary.
            The update reuses their buffers, so the frozen models must not share arrays
            with them: copy where they start equal.
        optimizers: an `optax.GradientTransformation` for each.
        kl_coef: initial β.
        slow_critic: keep a copy of the critic that trails it.
        old_policy: keep a copy of the actor, which answers until it is refreshed.
    """
    return TrainState(
        params=params,
        opt_state=ActorCritic(
            actor=optimizers.actor.init(params.actor),
            critic=optimizers.critic.init(params.critic),
        ),
        kl_coef=jnp.asarray(kl_coef, jnp.float32),
        score_moments=init_score_moments(),
        slow_critic=jax.tree.map(jnp.copy, params.critic) if slow_critic else None,
        old_policy=jax.tree.map(jnp.copy, params.actor) if old_policy else None,
        key=key,
        step=jnp.zeros((), jnp.int32),
    )


def step_keys(state: TrainState) -> tuple[Array, Array]:
    """Keys of the rollout and of the shuffle of the update that comes next."""
    rollout_key, shuffle_key = jax.random.split(
        jax.random.fold_in(state.key, state.step)
    )
    return rollout_key, shuffle_key


def init_model_state(
    key: Array, params: Params, optimizer: optax.GradientTransformation
) -> ModelState:
    """State before the first step."""
    return ModelState(
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        step=jnp.zeros((), jnp.int32),
    )
