"""Groups of responses to the same prompt, with dynamic sampling."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.types import Array, Rollout, record
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.recipes.prompt_batches import PromptBatch
from rlhf_jax.rollout.experience import used_responses


@record
class ScoredResponses:
    """Responses and their scores."""

    rollout: Rollout
    scores: Array  # [B] float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPrograms:
    """Compiled programs of `Groups`."""

    signal: Callable[[ScoredResponses], Array]  # [N] bool, see `has_signal`
    replace: Callable[[ScoredResponses, ScoredResponses, Array], ScoredResponses]


class Groups:
    """Groups of responses, from one or more rounds of sampling.

    A group has a signal if the scores of the responses that are trained on differ,
    before clipping and penalties: a length penalty alone would only teach length, and a
    masked response has no gradient. Groups without a signal are replaced by groups of
    later rounds, so the batch size is constant.

    Attributes:
        batch: the prompt of each response.
        scored: the responses.

    References:
        Yu et al., 2025, arXiv:2503.14476, section 3.2, "dynamic sampling".
    """

    batch: PromptBatch
    scored: ScoredResponses

    def __init__(self, config: GRPOConfig, programs: GroupPrograms):
        self._config = config
        self._programs = programs
        self._signal: np.ndarray | None = None  # [N] bool, of the groups so far
        self._rounds: list[dict[str, float]] = []
        self._greedy: dict[str, float] = {}

    def add(
        self, batch: PromptBatch, scored: ScoredResponses, metrics: dict[str, float]
    ) -> None:
        """Adds the groups of a round.

        Args:
            batch: the prompt of each response; groups are contiguous.
            scored: the responses.
            metrics: reward metrics.
        """
        signal = np.asarray(self._programs.signal(scored))
        scores, lengths = jax.device_get((scored.scores, scored.rollout.lengths))
        of_round = {
            "rollout/tokens": float(lengths.sum()),
            "reward/score_mean": float(scores.mean()),
            "reward/score_std": float(scores.std()),
            **metrics,
        }
        if self._config.groups.compares:
            of_round["group/no_signal"] = float(1.0 - signal.mean())
        self._rounds.append(of_round)
        if self._signal is None:
            self.batch, self.scored, self._signal = batch, scored, signal
            return
        index, self._signal = fill(self._signal, signal, self._config.group_size)
        self.scored = self._programs.replace(self.scored, scored, jnp.asarray(index))
        self.batch = self.batch.join(batch).take(index)

    @property
    def all_have_signal(self) -> bool:
        """Whether every group has a signal, so no further round is needed."""
        return self._signal is not None and bool(self._signal.all())

    def prompts(self) -> PromptBatch:
        """The prompt of each group."""
        size = self._config.group_size
        return self.batch.take(range(0, len(self.batch.rows), size))

    def count_greedy(self, scored: ScoredResponses, metrics: dict[str, float]) -> None:
        """Adds the greedy responses, which are sampled but not trained on."""
        self._greedy = {
            "reward/greedy_mean": float(jnp.mean(scored.scores)),
            "rollout/tokens": float(jnp.sum(scored.rollout.lengths)),
        }
        if "reward/failures" in metrics:
            self._greedy["reward/failures"] = metrics["reward/failures"]

    def metrics(self) -> dict[str, float]:
        """Metrics of all sampled responses, including replaced ones.

        `reward/…` and `group/no_signal` are means over the rounds; `rollout/tokens` and
        `reward/failures` are totals.
        """
        assert self._signal is not None
        rounds, totals = self._rounds, ("rollout/tokens", "reward/failures")
        metrics = {
            name: float(np.mean([of_round[name] for of_round in rounds]))
            * (len(rounds) if name in totals else 1)
            for name in rounds[0]
        }
        if self._config.resample:
            number = (len(rounds) - 1) * len(self._signal)
            metrics["group/resampled"] = float(number)
            metrics["group/kept_without_signal"] = float((~self._signal).sum())
        for name, value in self._greedy.items():
            metrics[name] = metrics.get(name, 0.0) + value
        return metrics


def fill(
    signal: np.ndarray, drawn_signal: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the concatenated old and new responses that form the next batch.

    Args:
        signal: `[N]` bool, of the groups so far.
        drawn_signal: `[N]` bool, of the new groups.
        size: responses per group.

    Returns:
        `[N · size]` indices, and `[N]` whether each group now has a signal.
    """
    idle, fresh = np.flatnonzero(~signal), np.flatnonzero(drawn_signal)
    count = min(len(idle), len(fresh))
    groups = np.arange(len(signal))
    groups[idle[:count]] = len(signal) + fresh[:count]
    signal = signal.copy()
    signal[idle[:count]] = True
    return (groups[:, None] * size + np.arange(size)).ravel(), signal


def has_signal(scored: ScoredResponses, *, config: GRPOConfig) -> Array:
    """`[N]` bool: whether raw scores differ within a group, masked responses aside."""
    scores = scored.scores.reshape(-1, config.group_size)
    used = used_responses(scored.rollout, config.scores).reshape(scores.shape)
    best = jnp.max(jnp.where(used, scores, -jnp.inf), axis=1)
    worst = jnp.min(jnp.where(used, scores, jnp.inf), axis=1)
    return best > worst


def replace_rows(
    kept: ScoredResponses, drawn: ScoredResponses, index: Array
) -> ScoredResponses:
    """Rows `index` of the two concatenated."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], kept, drawn)
