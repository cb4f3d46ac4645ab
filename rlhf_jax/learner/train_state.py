"""Train states: everything that changes during training, and is saved in checkpoints.

States contain only arrays. Apply functions and optimizers are passed to the functions
that need them: two `optax.adam(1e-5)` never compare equal, so a state that contains one
would trigger recompilation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algo.scores import ScoreMoments, init_score_moments
from rlhf_jax.algo.types import Array, Params, record


@record
class ActorCritic:
    """A pair for actor and critic: parameters, or optimizers."""

    actor: Any
    critic: Any


@record
class TrainState:
    """State of PPO and GRPO, without the frozen reference and reward model."""

    params: ActorCritic
    opt_state: ActorCritic
    kl_coef: Array  # [] float32, β of the per-token KL penalty
    score_moments: ScoreMoments  # of the scores so far, or of the reference's
    slow_critic: Params | None  # moving average of the critic, if used
    old_policy: Params | None  # the behavior policy, if not the current actor
    key: Array  # [] PRNG key of the run; folded with `step`, never replaced
    step: Array  # [] int32, updates completed or skipped


@record
class ModelState:
    """State of a stage that trains one model."""

    params: Params
    opt_state: optax.OptState
    key: Array  # [] PRNG key of the run
    step: Array  # [] int32, optimizer steps completed or skipped


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
        key: typed PRNG key, the root of all randomness of the run.
        params: parameters of actor and critic; without a critic, an empty dictionary.
            The update donates their buffers, so frozen models must not share arrays
            with them: copy if they start equal.
        optimizers: an `optax.GradientTransformation` for each.
        kl_coef: initial β.
        slow_critic: keep a moving average of the critic.
        old_policy: keep a copy of the actor as the behavior policy.
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
    """Keys for the rollout and the shuffling of the next update."""
    rollout_key, shuffle_key = jax.random.split(
        jax.random.fold_in(state.key, state.step)
    )
    return rollout_key, shuffle_key


def behavior_policy(state: TrainState) -> Params:
    """Trainable parameters of the behavior policy: the latest, or an older copy."""
    return state.params.actor if state.old_policy is None else state.old_policy


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
