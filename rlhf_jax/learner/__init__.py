"""Training on experience: states, optimizers, objectives, updates."""

from rlhf_jax.learner.imitation import imitation_objective
from rlhf_jax.learner.objectives import (
    Counts,
    count_experience,
    critic_free_objective,
    ppo_objective,
    separate_networks,
)
from rlhf_jax.learner.optimizer import make_optimizer, make_schedule
from rlhf_jax.learner.preference import preference_objective, ranking_objective
from rlhf_jax.learner.supervised_step import make_supervised_step
from rlhf_jax.learner.train_state import (
    ActorCritic,
    ModelState,
    TrainState,
    init_model_state,
    init_train_state,
    step_keys,
)
from rlhf_jax.learner.update import make_update

__all__ = [
    "ActorCritic",
    "Counts",
    "ModelState",
    "TrainState",
    "count_experience",
    "critic_free_objective",
    "imitation_objective",
    "init_model_state",
    "init_train_state",
    "make_optimizer",
    "make_schedule",
    "make_supervised_step",
    "make_update",
    "ppo_objective",
    "preference_objective",
    "ranking_objective",
    "separate_networks",
    "step_keys",
]
