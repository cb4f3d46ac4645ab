"""The reward of an answer: reward models and reward functions, weighed and added."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params, Rollout
from rlhf_jax.config.policy import PolicyConfig, function_name
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.recipes.answers import Answers
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch, PromptData
from rlhf_jax.rewards.functions import RewardScores, RewardWorkers
from rlhf_jax.rollout.scoring import mark_stops
from rlhf_jax.run.devices import put_batch
from rlhf_jax.run.progress import heading

NUM_PROBED = 2

ScoreRollout = Callable[[Params | None, Rollout], tuple[Array, Array]]
"""`(reward, rollout)` → the reward model's scores `[B]`, and how far it read `[B]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """What B answers of a rollout earned."""

    scores: Array  # [B] float32, on the devices
    metrics: dict[str, float]


def score_program(
    models: PolicyModels, *, stop_ids: Sequence[int], cut: bool
) -> ScoreRollout:
    """The reward model over a rollout, compiled; scores of 0 where there is none.

    Args:
        models: for the reward model.
        stop_ids: tokens that end an answer.
        cut: whether answers end at them; if not, no more than that is read.
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
    """What N held-out answers earned."""

    scores: np.ndarray  # [N] float32, as in training
    by_function: dict[str, np.ndarray]  # [N] float32 each, those of `eval_reward` first
    failures: int | None  # answers with a stated score, where there is one to state


class RewardFunctions(contextlib.ExitStack):
    """The reward functions of a run, as a context manager that holds their processes.

    Entering it imports and checks every function; enter it before any expensive work.

    Args:
        config: of the run.

    Raises:
        RewardFunctionError: on entering, where a function cannot be used.
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
        with contextlib.ExitStack() as entered:  # ends those before one that fails
            for workers in self._all():
                entered.enter_context(workers)
            self.push(entered.pop_all())
        return self

    def probe(self, data: PromptData) -> None:
        """Asks every function about empty answers to the first prompts of its files.

        A function that needs a column which the data does not have says so here,
        before anything is compiled; and a policy may well answer nothing.

        Raises:
            RewardFunctionError: where a function fails and no score is stated for that.
        """
        number = min(NUM_PROBED, len(data.held_out.rows))
        held_out = data.held_out.take(range(number))
        for workers in self._all():
            probe(workers, held_out)
        if self.train is not None:  # its columns may be others
            probe(self.train, data.first(NUM_PROBED))

    def _all(self) -> list[RewardWorkers]:
        return [x for x in (self.train, self.held_out) if x is not None]


def probe(workers: RewardWorkers, batch: PromptBatch) -> None:
    """Asks functions about empty answers to some prompts.

    Raises:
        RewardFunctionError: where a function fails and no score is stated for that.
    """
    workers.score(batch.texts, [""] * len(batch.rows), batch.columns)


class Judge:
    """Rewards of answers, in training and on held-out prompts.

    Args:
        config: of the run.
        models: for the reward model and its parameters.
        functions: entered.
        tokenization: to read answers with.
        score: from `score_program`.
        mesh: where scores go.
    """

    def __init__(
        self,
        config: PolicyConfig,
        models: PolicyModels,
        functions: RewardFunctions,
        tokenization: Tokenization,
        score: ScoreRollout,
        mesh: Mesh,
    ):
        self._weight = config.reward_model_weight
        self._states_failures = config.reward_on_failure is not None
        self._has_complained = False
        self._quiet = config.quiet
        self._models = models
        self._functions = functions
        self._tokenization = tokenization
        self._score = score
        self._mesh = mesh

    def of_rollout(self, rollout: Rollout, batch: PromptBatch) -> Rewards:
        """Rewards of B answers; `batch` has the prompt of each.

        Raises:
            RewardFunctionError: where a function fails and no score is stated for that.
        """
        by_model, lengths = self._score(self._models.reward, rollout)
        scores = by_model if self._weight == 1.0 else self._weight * by_model
        functions = self._functions.train
        if functions is None:
            return Rewards(scores=scores, metrics={})
        responses, lengths = jax.device_get((rollout.responses, lengths))
        found = self._ask(
            functions, self._tokenization.decode(responses, lengths), batch
        )
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
        self, answers: Answers, texts: Sequence[str], batch: PromptBatch
    ) -> HeldOutRewards:
        """Rewards of N held-out answers, and what every function says of them.

        Args:
            answers: with the scores of the reward model, if there is one.
            texts: the answers.
            batch: the prompt of each.

        Raises:
            RewardFunctionError: where a function fails and no score is stated for that.
        """
        scores = np.zeros(len(texts), np.float32)
        if answers.scores is not None:
            scores += self._weight * answers.scores
        by_function, failures = {}, 0
        for workers in (self._functions.held_out, self._functions.train):
            if workers is None:
                continue
            found = self._ask(workers, texts, batch)
            by_function |= _by_name(workers, found)
            failures += int(found.failures.sum())
            if workers is self._functions.train:
                scores += found.scores
        return HeldOutRewards(
            scores=scores,
            by_function=by_function,
            failures=failures if self._states_failures else None,
        )

    def _ask(
        self, workers: RewardWorkers, texts: Sequence[str], batch: PromptBatch
    ) -> RewardScores:
        """What functions say; the first failure of all is told."""
        found = workers.score(batch.texts, texts, batch.columns)
        if found.complaints and not self._has_complained:
            self._has_complained = True
            heading(
                f"a reward function fails, and the row gets a stated score: "
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
        on_failure="stop" if failing is None else failing,
    )


def _by_name(workers: RewardWorkers, found: RewardScores) -> dict[str, np.ndarray]:
    names = map(function_name, workers.specs)
    return dict(zip(names, found.by_function, strict=True))
