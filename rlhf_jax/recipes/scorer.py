"""Rewards of responses: a weighted sum of reward models and reward functions."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params, Rollout
from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.config.reward_limits import LARGEST_REWARD
from rlhf_jax.config.reward_sources import function_name
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.files.printable import shown
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch, PromptData
from rlhf_jax.recipes.responses import Responses
from rlhf_jax.rewards.functions import RewardError, RewardScores, RewardWorkers
from rlhf_jax.rollout.scoring import mark_stops
from rlhf_jax.run.devices import put_batch
from rlhf_jax.run.progress import heading

NUM_PROBED = 2

RewardModelProgram = Callable[[Params | None, Rollout], tuple[Array, Array]]
"""`(reward, rollout)` → the reward model's scores `[B]`, and the lengths read `[B]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """Rewards of B responses of a rollout."""

    scores: Array  # [B] float32, on the devices
    metrics: dict[str, float]


def reward_model_program(
    models: PolicyModels, *, stop_ids: Sequence[int], cut: bool
) -> RewardModelProgram:
    """The reward model on a rollout, compiled; scores of 0 if there is none.

    Args:
        models: include the reward model.
        stop_ids: stop tokens.
        cut: whether responses end at them; if not, it reads only up to them.
    """

    def score(reward: Params | None, rollout: Rollout) -> tuple[Array, Array]:
        read = rollout.mask
        if not cut:
            _, read = mark_stops(rollout, stop_ids)
        lengths = jnp.sum(read, axis=1, dtype=jnp.int32)
        if models.score_fn is None:
            return jnp.zeros(rollout.lengths.shape, jnp.float32), lengths
        mask = jnp.concatenate([rollout.prompts.mask, read], axis=1)
        scores = models.score_fn(reward, rollout.tokens, mask)
        return scores.astype(jnp.float32), lengths

    return jax.jit(score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutRewards:
    """Rewards of N held-out responses."""

    scores: np.ndarray  # [N] float32, as in training
    by_function: dict[str, np.ndarray]  # [N] float32 each, those of `eval_reward` first
    failures: (
        int | None
    )  # responses with --reward-on-failure as their score, if it is set


class RewardFunctions(contextlib.ExitStack):
    """The reward functions of a run, as a context manager that owns their processes.

    Entering it imports and checks every function; do so before any expensive work.

    Args:
        config: configuration of the run.

    Raises:
        RewardFunctionError: on entering, if a function cannot be used.
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.train = self.held_out = None
        if config.reward:
            self.train = _workers(config, config.reward, config.reward_weights)
        if config.eval_reward:
            self.held_out = _workers(config, config.eval_reward, ())

    def __enter__(self) -> "RewardFunctions":
        super().__enter__()
        with contextlib.ExitStack() as entered:  # closes earlier ones if one fails
            for workers in self._all():
                entered.enter_context(workers)
            self.push(entered.pop_all())
        return self

    def probe(self, data: PromptData) -> None:
        """Calls every function on empty responses to the first prompts of its files.

        A missing column raises here, before anything is compiled; and empty responses
        do occur in training.

        Raises:
            RewardFunctionError: if a function fails, without `reward_on_failure`.
        """
        number = min(NUM_PROBED, len(data.held_out.rows))
        held_out = data.held_out.take(range(number))
        for workers in self._all():
            probe(workers, held_out)
        if self.train is not None:  # its columns may differ
            probe(self.train, data.first(NUM_PROBED))

    def _all(self) -> list[RewardWorkers]:
        return [x for x in (self.train, self.held_out) if x is not None]


def probe(workers: RewardWorkers, batch: PromptBatch) -> None:
    """Calls functions on empty responses to some prompts.

    Raises:
        RewardFunctionError: if a function fails, without `reward_on_failure`.
    """
    workers.score(batch.texts, [""] * len(batch.rows), batch.columns)


class Scorer:
    """Rewards of responses, in training and on held-out prompts.

    Args:
        config: configuration of the run.
        models: include the reward model and its parameters.
        functions: entered reward functions.
        tokenization: decodes responses.
        score: from `reward_model_program`.
        mesh: device mesh of the scores.
    """

    def __init__(
        self,
        config: PolicyConfig,
        models: PolicyModels,
        functions: RewardFunctions,
        tokenization: Tokenization,
        score: RewardModelProgram,
        mesh: Mesh,
    ):
        self._weight = config.reward_model_weight
        self._path = config.reward_model
        self._states_failures = config.reward_on_failure is not None
        self._has_complained = False
        self._quiet = config.quiet
        self._models = models
        self._functions = functions
        self._tokenization = tokenization
        self._score = score
        self._mesh = mesh

    def of_rollout(self, rollout: Rollout, batch: PromptBatch) -> Rewards:
        """Rewards of B responses; `batch` has the prompt of each.

        Raises:
            RewardFunctionError: if a function fails, without `reward_on_failure`.
            RewardError: if a reward is not finite, or too large.
        """
        by_model, lengths = self._score(self._models.reward, rollout)
        scores = by_model if self._weight == 1.0 else self._weight * by_model

        def texts() -> list[str]:
            return self._tokenization.decode(
                *jax.device_get((rollout.responses, lengths))
            )

        functions = self._functions.train
        if functions is None:
            self._check(by_model, 0, texts)
            return Rewards(scores=scores, metrics={})
        responses = texts()
        found = self._ask(functions, responses, batch)
        self._check(by_model, found.scores, lambda: responses)
        metrics = {
            f"reward/{name}": float(np.mean(row))
            for name, row in _by_name(functions, found).items()
        }
        if self._models.score_fn is not None:
            metrics["reward/model"] = float(jnp.mean(by_model))
        if self._states_failures:
            metrics["reward/failures"] = float(found.failures.sum())
        return Rewards(
            scores=scores + put_batch(self._mesh, found.scores), metrics=metrics
        )

    def of_answers(
        self, answers: Responses, texts: Sequence[str], batch: PromptBatch
    ) -> HeldOutRewards:
        """Rewards of N held-out responses, in total and by function.

        Args:
            answers: responses, with the reward model's scores, if any.
            texts: the responses as text.
            batch: the prompt of each.

        Raises:
            RewardFunctionError: if a function fails, without `reward_on_failure`.
            RewardError: if a reward is not finite, or too large.
        """
        scores = np.zeros(len(texts), np.float32)
        by_function, failures = {}, 0
        for workers in (self._functions.held_out, self._functions.train):
            if workers is None:
                continue
            found = self._ask(workers, texts, batch)
            by_function |= _by_name(workers, found)
            failures += int(found.failures.sum())
            if workers is self._functions.train:
                scores += found.scores
        if answers.scores is not None:
            self._check(answers.scores, scores, lambda: texts)
            scores += self._weight * answers.scores
        return HeldOutRewards(
            scores=scores,
            by_function=by_function,
            failures=failures if self._states_failures else None,
        )

    def _check(
        self,
        by_model: Array | np.ndarray,
        by_functions: np.ndarray | int,
        texts: Callable[[], Sequence[str]],
    ) -> None:
        """Raises RewardError if a score of the reward model or a sum is unusable."""
        if self._models.score_fn is None:
            return  # the functions' scores and sums are checked
        by_model = np.asarray(by_model, np.float64)
        total = self._weight * by_model + by_functions
        # Negated: NaN is in no range.
        unusable = ~(np.maximum(abs(by_model), abs(total)) <= LARGEST_REWARD)
        if not unusable.any():
            return
        row = int(unusable.argmax())
        raise RewardError(
            f"the reward of row {row} (response {shown(texts()[row])}) is "
            f"{total[row]:g}, with {by_model[row]:g} from the reward model times "
            f"reward-model-weight={self._weight:g}; both go from "
            f"{-LARGEST_REWARD:g} to {LARGEST_REWARD:g}: repair the model at "
            f"reward-model={self._path!r}, or lower the weight"
        )

    def _ask(
        self, workers: RewardWorkers, texts: Sequence[str], batch: PromptBatch
    ) -> RewardScores:
        """Scores of functions; prints the first failure of the run."""
        found = workers.score(batch.texts, texts, batch.columns)
        if found.complaints and not self._has_complained:
            self._has_complained = True
            heading(
                f"a reward function failed; its row uses --reward-on-failure: "
                f"{found.complaints[0]}",
                quiet=self._quiet,
            )
        return found


def _workers(
    config: PolicyConfig, specs: Sequence[str], weights: Sequence[float]
) -> RewardWorkers:
    failing = config.reward_on_failure
    return RewardWorkers(
        specs,
        weights=weights or None,
        processes=config.reward_processes,
        time_limit=config.reward_time_limit,
        memory_limit=config.reward_memory_limit,
        on_failure="stop" if failing is None else failing,
    )


def _by_name(workers: RewardWorkers, found: RewardScores) -> dict[str, np.ndarray]:
    names = map(function_name, workers.specs)
    return dict(zip(names, found.by_function, strict=True))
