"""Rewards, evaluation and files of `ppo` and `grpo`, and the next KL coefficient."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.kl import adapt_kl_coef
from rlhf_jax.algo.types import Array, Experience, Rollout
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.train_state import TrainState
from rlhf_jax.recipes.collapse import CollapseWatch
from rlhf_jax.recipes.held_out import HeldOut
from rlhf_jax.recipes.networks import save_trained
from rlhf_jax.recipes.policy_keeper import PolicyKeeper
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch, PromptData
from rlhf_jax.recipes.responses import Sampler
from rlhf_jax.recipes.scorer import RewardFunctions, RewardModelProgram, Rewards, Scorer
from rlhf_jax.rewards.functions import RewardError
from rlhf_jax.run.progress import warn
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import Session


class PolicyRun(contextlib.ExitStack):
    """A run of `ppo` or `grpo`, from the first step to the saved policy.

        with PolicyRun(config, …) as run:
            state = run.restore(state)
            run.evaluate_start(state)
            for step in run.steps():
                …
                rewards = run.rewards(state, rollout, batch)
                …
                state = run.finish(step, state, metrics, experience, batch)
            run.save(state)
        run.report()

    Args:
        config: configuration of the run.
        models: loaded models.
        sample: samples responses to held-out prompts.
        score: the reward model's program, from `reward_model_program`.
        data: includes the held-out prompts.
        functions: entered reward functions.
        tokenization: of the policy, and saved with it.
        mesh: device mesh.
        eval_key: key for held-out sampling.
        shown: label → metric, for the terminal.
    """

    def __init__(
        self,
        config: PPOConfig | GRPOConfig,
        *,
        models: PolicyModels,
        sample: Sampler,
        score: RewardModelProgram,
        data: PromptData,
        functions: RewardFunctions,
        tokenization: Tokenization,
        mesh: Mesh,
        eval_key: Array,
        shown: Mapping[str, str],
    ):
        super().__init__()
        self._config = config
        self._shown = shown
        self._scorer = Scorer(config, models, functions, tokenization, score, mesh)
        self._evaluate = HeldOut(
            config,
            data.held_out,
            models=models,
            sample=sample,
            scorer=self._scorer,
            tokenization=tokenization,
            mesh=mesh,
            key=eval_key,
        )
        self._watch = CollapseWatch(config)
        self._session = Session(config)
        self.directory: RunDirectory = self._session.run
        assert models.network is not None
        self._vocab_size = models.module.config.vocab_size
        self._save = partial(
            save_trained, self.directory, models.network, config, tokenization
        )

    def __enter__(self) -> "PolicyRun":
        super().__enter__()
        self.enter_context(self._session)
        self._step = self._session.start_step
        return self

    def restore(self, state: TrainState) -> TrainState:
        """`state`, or the checkpoint's when resuming."""
        state = self._session.restore(state)
        self._keeper = PolicyKeeper(self._config, self._session, self._save)
        # Checkpoints of older versions have no counters, but their logs do.
        tokens = sum(self._session.history("rollout/tokens")[-1:])
        self._session.counters.setdefault("rollout/tokens", tokens)
        return state

    @property
    def is_fresh(self) -> bool:
        """Whether no step has been taken yet."""
        return self._session.start_step == 0

    def evaluate_start(self, state: TrainState) -> None:
        """Evaluates the policy before the first step.

        A resumed run has done that already, unless a reward function failed in it.
        """
        session = self._session
        if self.is_fresh or session.evaluation_is_missing():
            metrics = self._evaluate(session, self._step, state.params.actor)
            self._keeper.see(self._step, metrics, state.params.actor)
            session.log(self._step, metrics, shown=self._shown)
        else:
            self._keeper.start(session, state.params.actor)

    def steps(self) -> Iterator[int]:
        """The remaining steps, counted from 1; ends early without progress."""
        for step in self._session.steps():
            if self._keeper.is_done:
                return
            yield step

    def rewards(
        self, state: TrainState, rollout: Rollout, batch: PromptBatch
    ) -> Rewards:
        """Rewards of B responses; `batch` has the prompt of each.

        If a reward is unusable, `state` is saved as the state after the last step.

        Raises:
            RewardError: with the command to resume.
        """
        try:
            return self._scorer.of_rollout(rollout, batch)
        except RewardError as error:
            self._session.save_and_raise(self._step, state, error)

    def finish(
        self,
        step: int,
        state: TrainState,
        metrics: dict[str, float],
        experience: Experience,
        batch: PromptBatch,
    ) -> TrainState:
        """Ends a step: checks that it is finite, then evaluates, logs and saves if due.

        Args:
            step: number of the step.
            state: state after it.
            metrics: metrics of the step, on the host.
            experience: experience of the step.
            batch: its prompts, one per response.

        Returns:
            The state to continue with; if the step was skipped, that before it.

        Raises:
            NonFiniteError: if a loss or gradient was not finite.
            RewardError: if a reward is unusable in the evaluation, after a checkpoint.
            Interrupted: after a checkpoint, when asked to stop.
        """
        session = self._session
        state, metrics = session.check_finite(
            step,
            state,
            metrics,
            experience,
            prompts=batch.texts,
            vocab_size=self._vocab_size,
        )
        actor = state.params.actor
        for line in self._watch.see(metrics):
            warn(f"step {step}: {line}")
        session.counters["rollout/tokens"] += metrics["rollout/tokens"]
        metrics["rollout/tokens"] = session.counters["rollout/tokens"]  # running total
        if session.is_eval_step(step):
            try:
                metrics |= self._evaluate(session, step, actor)
            except RewardError as error:
                session.log(step, metrics, shown=self._shown)
                session.save_and_raise(step, state, error)
            self._keeper.see(step, metrics, actor)
        session.log(step, metrics, shown=self._shown)
        session.checkpoint(step, state, last=self._keeper.is_done)
        self._step = step
        return state

    def save(self, state: TrainState) -> None:
        """Saves the last policy, unless the best one is saved already."""
        self._keeper.finish(state.params.actor)

    def report(self) -> None:
        """Writes the report of the run, after the last checkpoint."""
        self._session.report()


def recomputes_logprobs(config: PPOConfig | GRPOConfig) -> bool:
    """Whether behavior log-probabilities are recomputed, not the sampler's."""
    if config.old_logprobs == "auto":
        exact = config.dtype == "float32" and jax.default_backend() == "cpu"
        return not exact
    return config.old_logprobs == "recomputed"


def next_kl_coef(
    config: PPOConfig | GRPOConfig, kl_coef: Array, metrics: dict[str, Array]
) -> Array:
    """`[]`, β of the next update; unchanged if not adaptive."""
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
