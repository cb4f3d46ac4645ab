"""A whole PPO update, epochs × minibatches × microbatches, as one compiled program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.algo.minibatches import split_minibatches
from rlhf_jax.algo.types import Array, Experience
from rlhf_jax.interfaces import BATCH_AXES
from rlhf_jax.learner.finite import first_nonfinite
from rlhf_jax.learner.gradients import (
    Metrics,
    Objective,
    accumulate_gradients,
    apply_gradients,
)
from rlhf_jax.learner.train_state import ActorCritic, TrainState, step_keys

UpdateFn = Callable[[TrainState, Experience], tuple[TrainState, Metrics]]


def make_update(
    objective: Objective,
    optimizers: ActorCritic,
    *,
    num_epochs: int,
    num_minibatches: int,
    num_microbatches: int = 1,
    state_sharding: TrainState | None = None,
) -> UpdateFn:
    """Builds `update(state, experience) -> (state, metrics)`; the state is donated.

    Every epoch shuffles the batch anew and takes one optimizer step per minibatch, so
    an update takes `num_epochs · num_minibatches` steps against the same frozen old
    log-probabilities and advantages. Loss terms are divided by the response tokens of
    the whole minibatch: microbatches and devices change no gradient.

    Args:
        objective: `ppo_objective(…)`, over `ActorCritic` parameters.
        optimizers: an `optax.GradientTransformation` for each of actor and critic.
        num_epochs: passes over the experience.
        num_minibatches: optimizer steps per pass; with `num_microbatches`, their
            product divides the batch size.
        num_microbatches: parts of a minibatch whose gradients are summed.
        state_sharding: `NamedSharding`s in the shape of the state; None: one device.

    Returns:
        A compiled function; rebind the state, its old buffers are reused. Metrics are
        float32 scalars, means over the optimizer steps. Where a loss or gradient is not
        finite the state stays as it was before that optimizer step, `step` does not
        advance, and `first_nonfinite/<term>` says where.
    """

    minibatch_step = _minibatch_step(
        objective, optimizers, num_microbatches=num_microbatches
    )

    def update(state: TrainState, experience: Experience) -> tuple[TrainState, Metrics]:
        _, key = step_keys(state)

        def epoch(carry, epoch_key: Array):
            minibatches = split_minibatches(
                epoch_key, experience, num_minibatches=num_minibatches
            )
            if state_sharding is not None:  # every minibatch on all devices
                mesh = jax.tree.leaves(state_sharding)[0].mesh
                spread = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
                minibatches = jax.lax.with_sharding_constraint(minibatches, spread)
            return jax.lax.scan(minibatch_step, carry, minibatches)

        start = (state.params, state.opt_state, jnp.asarray(True))
        keys = jax.random.split(key, num_epochs)
        (params, opt_state, healthy), (metrics, terms) = jax.lax.scan(
            epoch, start, keys
        )
        first_step = {
            f"policy/first_{name}": metrics[f"policy/{name}"][0, 0]
            for name in ("clip_fraction", "approx_kl")
            if f"policy/{name}" in metrics
        }
        metrics = jax.tree.map(jnp.mean, metrics) | first_step
        metrics |= first_nonfinite(jax.tree.map(jnp.ravel, terms))
        state = TrainState(
            params=params,
            opt_state=opt_state,
            kl_coef=state.kl_coef,
            key=state.key,
            step=state.step + healthy,
        )
        return state, metrics

    if state_sharding is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(update, donate_argnums=0, out_shardings=(state_sharding, None))


def _minibatch_step(
    objective: Objective, optimizers: ActorCritic, *, num_microbatches: int
) -> Callable:
    """One optimizer step of actor and critic, as the body of a scan.

    Carries `(params, opt_state, healthy)`; once a term is not finite nothing changes
    any more. Puts out metrics, and the terms that have to be finite.
    """

    def step(carry, minibatch: Experience):
        params, opt_state, healthy = carry
        num_tokens = jnp.maximum(jnp.sum(minibatch.mask), 1).astype(jnp.float32)
        loss, metrics, grads = accumulate_gradients(
            objective, params, minibatch, num_tokens, num_microbatches=num_microbatches
        )
        terms = {name.replace("/", "_"): value for name, value in metrics.items()} | {
            "total_loss": loss,
            "actor_gradient": optax.tree.norm(grads.actor),
            "critic_gradient": optax.tree.norm(grads.critic),
        }
        healthy &= jnp.isfinite(jnp.stack(list(terms.values()))).all()
        actor, actor_opt = apply_gradients(
            optimizers.actor,
            grads.actor,
            opt_state.actor,
            params.actor,
            accept=healthy,
        )
        critic, critic_opt = apply_gradients(
            optimizers.critic,
            grads.critic,
            opt_state.critic,
            params.critic,
            accept=healthy,
        )
        params = ActorCritic(actor=actor, critic=critic)
        opt_state = ActorCritic(actor=actor_opt, critic=critic_opt)
        metrics = metrics | {
            "optim/actor_grad_norm": terms["actor_gradient"],
            "optim/critic_grad_norm": terms["critic_gradient"],
        }
        return (params, opt_state, healthy), (metrics, terms)

    return step
