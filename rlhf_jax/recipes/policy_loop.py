"""What PPO and its relatives without a critic share: the loop around their step."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.kl import adapt_kl_coef
from rlhf_jax.algo.types import Array
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.train_state import TrainState
from rlhf_jax.recipes.answers import Sampler
from rlhf_jax.recipes.held_out import HeldOut, PolicyKeeper
from rlhf_jax.recipes.networks import save_trained
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptData
from rlhf_jax.recipes.scorer import Judge, RewardFunctions, ScoreRollout
from rlhf_jax.rewards.functions import RewardFunctionError
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import Session

Carried = dict[str, Any]
"""Fields of the state that scoring changes: the KL coefficient, the score moments."""


StepFn = Callable[
    [Judge, int, TrainState], tuple[TrainState, Carried, dict[str, float]]
]
"""`(judge, step, state)` → the new state, what else the next starts from, metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyStage:
    """What a stage brings to the loop."""

    name: str  # the command
    shown: Mapping[str, str]  # label → metric, for the terminal
    models: PolicyModels
    answer: Sampler  # for held-out prompts
    score: ScoreRollout
    step: StepFn  # one update, numbered from 1
    begin: Callable[[Judge, TrainState], TrainState] = lambda judge, state: state
    """changes the state of a fresh run before its first step"""


def train_policy(
    config: PPOConfig | GRPOConfig,
    stage: PolicyStage,
    state: TrainState,
    *,
    data: PromptData,
    functions: RewardFunctions,
    tokenization: Tokenization,
    mesh: Mesh,
    eval_key: Array,
) -> RunDirectory:
    """Steps, held-out evaluations and checkpoints; then the policy and the report.

    Args:
        config: of the run.
        stage: what is done at each step.
        state: on its mesh; given up to the steps.
        data: for the held-out prompts.
        functions: entered.
        tokenization: of the policy, and written with it.
        mesh: where everything lives.
        eval_key: root of the held-out sampling.

    Raises:
        RewardFunctionError: after a checkpoint, saying how to go on.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number, saying how to go on.
    """
    judge = Judge(config, stage.models, functions, tokenization, stage.score, mesh)
    evaluate = HeldOut(
        config,
        data.held_out,
        models=stage.models,
        sample=stage.answer,
        judge=judge,
        tokenization=tokenization,
        mesh=mesh,
        key=eval_key,
    )
    network = stage.models.network
    assert network is not None
    with Session(config, stage=stage.name, total_steps=config.updates) as session:
        state = session.restore(state)
        save = partial(save_trained, session.run, network, config, tokenization)
        keeper = PolicyKeeper(config, session, save)
        if session.start_step == 0:
            state = stage.begin(judge, state)
            metrics = evaluate(session, 0, state.params.actor)
            keeper.see(0, metrics, state.params.actor)
            session.log(0, metrics, shown=stage.shown)
        elif session.evaluation_is_missing():  # a reward function failed in it
            metrics = evaluate(session, session.start_step, state.params.actor)
            keeper.see(session.start_step, metrics, state.params.actor)
            session.log(session.start_step, metrics, shown=stage.shown)
        else:
            keeper.start(session, state.params.actor)
        step_fn = partial(stage.step, judge)
        state = _steps(session, state, step_fn, evaluate, keeper, stage.shown)
        keeper.finish(state.params.actor)
    session.report()
    return session.run


def _steps(
    session: Session,
    state: TrainState,
    step_fn: Callable,
    evaluate: HeldOut,
    keeper: PolicyKeeper,
    shown: Mapping[str, str],
) -> TrainState:
    """All that are left, up to the last or to where patience runs out."""
    tokens = sum(session.history("rollout/tokens")[-1:])
    for step in session.steps():
        if keeper.is_done:
            break
        try:  # rewards are asked for before the update takes the state
            state, carried, metrics = step_fn(step, state)
        except RewardFunctionError as error:
            session.save_and_raise(step - 1, state, error)
        metrics = session.check_finite(step, metrics)
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
    return state


def recomputes_logprobs(config: PPOConfig | GRPOConfig) -> bool:
    """Whether old log-probabilities are computed anew, or are the sampler's."""
    if config.old_logprobs == "auto":
        exact = config.dtype == "float32" and jax.default_backend() == "cpu"
        return not exact
    return config.old_logprobs == "recomputed"


def next_kl_coef(
    config: PPOConfig | GRPOConfig, kl_coef: Array, metrics: dict[str, Array]
) -> Array:
    """`[]`, β of the next update; the same where it is not adaptive."""
    if not config.kl.adapts:
        return kl_coef
    assert config.kl.target is not None
    unit = {"sequence-sum": "kl/sequence", "token-mean": "kl/token"}
    return adapt_kl_coef(
        kl_coef,
        metrics[unit[config.kl.unit]],
        target_kl=config.kl.target,
        horizon=config.kl.horizon,
        num_episodes=config.batch_size,
    )
