"""Optimizers and learning-rate schedules of the stages."""

import optax

from rlhf_jax.algo.types import Array
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import OptimizerConfig
from rlhf_jax.learner.optimizer import make_optimizer, make_schedule
from rlhf_jax.learner.train_state import ActorCritic


def make_grpo_optimizers(config: GRPOConfig) -> tuple[ActorCritic, ActorCritic]:
    """Optimizer and learning-rate schedule of the actor; None for the critic."""
    actor, schedule = optimizer_of(
        config.optimizer,
        total_steps=config.updates * config.epochs * config.minibatches,
    )
    return (
        ActorCritic(actor=actor, critic=optax.identity()),
        ActorCritic(actor=schedule, critic=None),
    )


def make_ppo_optimizers(config: PPOConfig) -> tuple[ActorCritic, ActorCritic]:
    """Optimizers and learning-rate schedules of actor and critic.

    The actor's schedule starts after the critic's warm-up.
    """
    steps_per_update = config.epochs * config.minibatches
    actor, actor_rate = optimizer_of(
        config.actor_optimizer,
        total_steps=(config.updates - config.critic_warmup) * steps_per_update,
    )
    critic, critic_rate = optimizer_of(
        config.critic_optimizer, total_steps=config.updates * steps_per_update
    )
    return (
        ActorCritic(actor=actor, critic=critic),
        ActorCritic(actor=actor_rate, critic=critic_rate),
    )


def learning_rates(schedules: ActorCritic, opt_state: ActorCritic) -> dict[str, float]:
    """Learning rates of the next optimizer step, counting only steps taken.

    A schedule is None if there is no critic.
    """
    return {
        f"optim/{name}_learning_rate": float(schedule(_steps_taken(state)))
        for name, schedule, state in (
            ("actor", schedules.actor, opt_state.actor),
            ("critic", schedules.critic, opt_state.critic),
        )
        if schedule is not None
    }


def _steps_taken(opt_state: optax.OptState) -> Array:
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return count


def optimizer_of(
    config: OptimizerConfig, *, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a configuration, and its learning-rate schedule."""
    schedule = make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        total_steps=total_steps,
        warmup_steps=round(config.warmup_fraction * total_steps),
        end_fraction=config.end_fraction,
    )
    optimizer = make_optimizer(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        form=config.form,
        weight_decay=config.weight_decay,
        decay=config.decay,
        max_grad_norm=config.max_grad_norm or None,
    )
    return optimizer, schedule
