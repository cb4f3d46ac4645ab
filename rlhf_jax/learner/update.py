"""A full update, epochs × minibatches × microbatches, as one compiled function."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.algo.minibatches import split_minibatches
from rlhf_jax.algo.types import Array, Experience, Params
from rlhf_jax.interfaces import BATCH_AXES
from rlhf_jax.learner.finite import TERMS
from rlhf_jax.learner.gradients import (
    Assemble,
    Metrics,
    Objective,
    accumulate_gradients,
    apply_gradients,
    on_trainable,
)
from rlhf_jax.learner.objectives import count_experience
from rlhf_jax.learner.train_state import ActorCritic, TrainState, step_keys

UpdateFn = Callable[..., tuple[TrainState, Metrics]]


def make_update(
    objective: Objective,
    optimizers: ActorCritic,
    *,
    num_epochs: int,
    num_minibatches: int,
    num_microbatches: int = 1,
    prepare: Callable[[Experience], Experience] | None = None,
    max_kl: float | None = None,
    critic_warmup: int = 0,
    slow_critic_decay: float | None = None,
    refresh_every: int = 1,
    assemble: Assemble | None = None,
    objective_key: bool = False,
    undo: bool = True,
    state_sharding: TrainState | None = None,
) -> UpdateFn:
    """Builds `update(state, experience, frozen=None, carried=None)`.

    It returns the next state and metrics. The state is donated, frozen parameters are
    not. `carried` are fields of the state that change with the update, by name, such
    as `{"kl_coef": …}`: if the update fails, they do not change either.

    Every epoch reshuffles the batch and takes one optimizer step per minibatch, so an
    update takes `num_epochs · num_minibatches` steps with the same old
    log-probabilities and advantages. Loss terms are divided by the response tokens of
    the whole minibatch, so microbatches and devices do not change gradients.

    Args:
        objective: `ppo_objective(…)` or `critic_free_objective(…)`, over `ActorCritic`
            parameters.
        optimizers: an `optax.GradientTransformation` for each of actor and critic;
            without a critic, `optax.identity()`.
        num_epochs: passes over the experience.
        num_minibatches: optimizer steps per pass; with `num_microbatches`, their
            product divides the batch size.
        num_microbatches: parts of a minibatch whose gradients are summed.
        prepare: applied to every whole minibatch, for example to whiten its advantages.
        max_kl: early stopping: once the KL to the behavior policy exceeds this many
            nats per token in a minibatch, its step and all later steps of this update
            are skipped; an infinite or NaN KL also stops. None: no early stopping.
        critic_warmup: number of updates at the start of the run that train only the
            critic.
        slow_critic_decay: d; after the update the slow critic becomes d · slow +
            (1 − d) · critic. The state must have one.
        refresh_every: k; sync the behavior policy, if the state has one, every k
            updates.
        assemble: combines trainable and frozen parameters into the objective's
            `ActorCritic`; None: all parameters are in the state.
        objective_key: pass a new key to the objective for every microbatch:
            `ppo_objective(…, policy_loss_key=True)`.
        undo: if an optimizer step fails, also undo those before it. With more than one
            optimizer step, this needs memory for a second copy of trainable parameters
            and optimizer state during the update.
        state_sharding: `NamedSharding`s in the shape of the state; None: one device.

    Returns:
        A compiled function; rebind the state, its old buffers are donated. Metrics are
        float32 scalars, means over the processed minibatches; with `max_kl`,
        `policy/steps` is the number of steps taken. `terms/<name>` has a loss term (see
        `Objective`) or a gradient norm of every optimizer step, `[N]`.

        If a term is not finite, its optimizer step and the later ones are skipped, and
        with `undo` the state returned is exactly that before the update. Without it,
        parameters and optimizer states include the steps before the failed one, which
        may be its cause: use such a state for debugging, not to continue.
        `pop_nonfinite` raises if there is such a term.
    """

    def update(
        state: TrainState,
        experience: Experience,
        frozen: Params | None = None,
        carried: Mapping[str, Any] | None = None,
    ) -> tuple[TrainState, Metrics]:
        _, key = step_keys(state)
        minibatch_step = _minibatch_step(
            on_trainable(objective, assemble, frozen, objective_key=objective_key),
            optimizers,
            num_microbatches=num_microbatches,
            prepare=prepare,
            max_kl=max_kl,
            train_actor=state.step >= critic_warmup,
        )

        def epoch(carry: _Carry, epoch_key: Array):
            draw_keys = None
            if objective_key:
                epoch_key, draw_key = jax.random.split(epoch_key)
                draw_keys = jax.random.split(draw_key, num_minibatches)
            minibatches = split_minibatches(
                epoch_key, experience, num_minibatches=num_minibatches
            )
            if state_sharding is not None:  # keeps every minibatch on all devices
                mesh = jax.tree.leaves(state_sharding)[0].mesh
                spread = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
                minibatches = jax.lax.with_sharding_constraint(minibatches, spread)
            return jax.lax.scan(minibatch_step, carry, (minibatches, draw_keys))

        true = jnp.asarray(True)
        start = _Carry(state.params, state.opt_state, healthy=true, going=true)
        end, (metrics, terms, looked_at, taken) = jax.lax.scan(
            epoch, start, jax.random.split(key, num_epochs)
        )
        metrics = _summarize(metrics, looked_at)
        if max_kl is not None:
            metrics["policy/steps"] = jnp.sum(taken).astype(jnp.float32)
        metrics |= {TERMS + name: jnp.ravel(value) for name, value in terms.items()}

        def if_healthy(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(end.healthy, n, o), new, old)

        params, opt_state = end.params, end.opt_state
        if undo and num_epochs * num_minibatches > 1:  # else the step itself was undone
            params = if_healthy(params, state.params)
            opt_state = if_healthy(opt_state, state.opt_state)
        state = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            slow_critic=_slow_critic(state, params, end, slow_critic_decay),
            old_policy=_old_policy(state, end, refresh_every),
            step=state.step + end.healthy,
            **{
                name: if_healthy(new, getattr(state, name))
                for name, new in (carried or {}).items()
            },
        )
        return state, metrics

    if state_sharding is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(update, donate_argnums=0, out_shardings=(state_sharding, None))


_Drawn = tuple[Experience, Array | None]
"""A minibatch, and the key for a stochastic objective."""


class _Carry(NamedTuple):
    """The carry between optimizer steps."""

    params: ActorCritic
    opt_state: ActorCritic
    healthy: Array  # [] bool, every loss and gradient so far was finite
    going: Array  # [] bool, the KL limit has not been exceeded


def _slow_critic(
    state: TrainState, params: ActorCritic, end: _Carry, decay: float | None
) -> Params | None:
    if state.slow_critic is None or decay is None:
        return state.slow_critic
    share = jnp.where(end.healthy, 1.0 - decay, 0.0)
    return optax.incremental_update(params.critic, state.slow_critic, share)


def _old_policy(state: TrainState, end: _Carry, refresh_every: int) -> Params | None:
    if state.old_policy is None:
        return None
    due = end.healthy & ((state.step + 1) % refresh_every == 0)
    return jax.tree.map(
        lambda new, old: jnp.where(due, new, old), end.params.actor, state.old_policy
    )


def _minibatch_step(
    objective: Callable[..., tuple[Array, Metrics]],
    optimizers: ActorCritic,
    *,
    num_microbatches: int,
    prepare: Callable[[Experience], Experience] | None,
    max_kl: float | None,
    train_actor: Array,
) -> Callable:
    """One optimizer step of actor and critic, as the body of a scan.

    Once a term is not finite, or the KL limit is exceeded, nothing changes any more.
    Returns metrics, the terms that must be finite, whether the minibatch was processed,
    and whether the step was taken.
    """

    def step(carry: _Carry, drawn: _Drawn):
        params, opt_state, healthy, going = carry
        minibatch, key = drawn
        if prepare is not None:
            minibatch = prepare(minibatch)
        loss, metrics, grads = accumulate_gradients(
            objective,
            params,
            minibatch,
            count_experience(minibatch),
            num_microbatches=num_microbatches,
            key=key,
        )
        norms = {"actor": optax.tree.norm(grads.actor)}
        if jax.tree.leaves(grads.critic):
            norms["critic"] = optax.tree.norm(grads.critic)
        terms = {
            name.replace("/", "_"): value
            for name, value in metrics.items()
            if name.endswith("loss")
        }
        terms |= {f"{name}_gradient": norm for name, norm in norms.items()}
        terms["total_loss"] = loss
        healthy &= jnp.isfinite(jnp.stack(list(terms.values()))).all()
        if max_kl is not None:
            going &= metrics["policy/approx_kl"] <= max_kl  # False for NaN
        actor, actor_opt = apply_gradients(
            optimizers.actor,
            grads.actor,
            opt_state.actor,
            params.actor,
            accept=healthy & going & train_actor,
        )
        critic, critic_opt = apply_gradients(
            optimizers.critic,
            grads.critic,
            opt_state.critic,
            params.critic,
            accept=healthy & going,
        )
        carry = _Carry(
            ActorCritic(actor=actor, critic=critic),
            ActorCritic(actor=actor_opt, critic=critic_opt),
            healthy,
            going,
        )
        metrics = metrics | {
            f"optim/{name}_grad_norm": norm for name, norm in norms.items()
        }
        return carry, (metrics, terms, jnp.asarray(True), healthy & going)

    def step_while_going(carry: _Carry, drawn: _Drawn):
        def stay(carry: _Carry, drawn: _Drawn):
            _, outputs = jax.eval_shape(step, carry, drawn)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
            return carry, zeros

        return jax.lax.cond(carry.going, step, stay, carry, drawn)

    return step if max_kl is None else step_while_going


def _summarize(metrics: Metrics, looked_at: Array) -> Metrics:
    """Means over the processed minibatches, and metrics of the first one."""
    first_step = {
        f"policy/first_{name}": metrics[f"policy/{name}"][0, 0]
        for name in ("clip_fraction", "approx_kl")
        if f"policy/{name}" in metrics
    }
    # The others are zeros. The first is always processed.
    count = jnp.sum(looked_at).astype(jnp.float32)
    return jax.tree.map(lambda x: jnp.sum(x) / count, metrics) | first_step
