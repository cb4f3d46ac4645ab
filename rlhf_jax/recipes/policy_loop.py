"""The loop that PPO and its relatives without a critic share."""

import dataclasses
from collections.abc import Callable, Mapping

from rlhf_jax.learner.train_state import TrainState
from rlhf_jax.recipes.held_out import HeldOut, PolicyKeeper
from rlhf_jax.recipes.ppo_programs import Carried
from rlhf_jax.recipes.session import Session
from rlhf_jax.runtime.reward_functions import RewardFunctionError

StepFn = Callable[[int, TrainState], tuple[TrainState, Carried, dict[str, float]]]
"""`(step, state)` → the new state, what else the next step starts from, metrics."""


def train_policy(
    session: Session,
    state: TrainState,
    step_fn: StepFn,
    *,
    evaluate: HeldOut,
    keeper: PolicyKeeper,
    shown: Mapping[str, str],
) -> TrainState:
    """Steps, held-out evaluations, log lines and checkpoints, from first to last.

    Args:
        session: entered; `state` is restored.
        state: given up to the steps.
        step_fn: one update, numbered from 1.
        evaluate: held-out metrics.
        keeper: decides which policy is written, and when to stop.
        shown: label → metric, for the terminal.

    Returns:
        The last state.

    Raises:
        RewardFunctionError: after a checkpoint, saying how to go on.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    if session.start_step == 0:
        metrics = evaluate(session, 0, state.params.actor)
        keeper.see(0, metrics, state.params.actor)
        session.log(0, metrics, shown=shown)
    tokens = sum(session.history("rollout/tokens")[-1:])
    for step in session.steps():
        if keeper.is_done:
            break
        try:  # rewards are asked for before the update takes the state
            state, carried, metrics = step_fn(step, state)
        except RewardFunctionError as error:
            session.save_and_raise(step - 1, state, error)
        metrics = session.check_finite(step, state, metrics)
        state = dataclasses.replace(state, **carried)
        tokens += metrics["rollout/tokens"]
        metrics["rollout/tokens"] = tokens
        if session.is_eval_step(step):
            try:
                metrics |= evaluate(session, step, state.params.actor)
            except RewardFunctionError as error:
                session.log(step, metrics, shown=shown)
                session.save_and_raise(step, state, error)
            keeper.see(step, metrics, state.params.actor)
        session.log(step, metrics, shown=shown)
        session.checkpoint(step, state, last=keeper.is_done)
    keeper.finish(state.params.actor)
    return state
