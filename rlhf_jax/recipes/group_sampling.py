"""Groups of responses to the same prompt, those without a signal replaced."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.types import Array, Experience, Params, Rollout, record
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.learner.train_state import ActorCritic, TrainState, step_keys
from rlhf_jax.learner.update import UpdateFn
from rlhf_jax.recipes.answers import Sampler
from rlhf_jax.recipes.policy_loop import Carried
from rlhf_jax.recipes.prompt_batches import PromptBatch
from rlhf_jax.recipes.scorer import Rewards, ScoreRollout
from rlhf_jax.rollout.experience import used_answers


@record
class Judged:
    """Answers and what they earned."""

    rollout: Rollout
    scores: Array  # [B] float32


RewardFn = Callable[[Rollout, PromptBatch], Rewards]


Put = Callable[[Any], Any]
"""Places arrays with a common leading axis on the devices."""


ExperienceFn = Callable[
    [TrainState, ActorCritic, Params | None, Judged, Judged | None],
    tuple[Experience, Carried, dict[str, Array]],
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOPrograms:
    """What one update runs, compiled."""

    answering: Callable[[TrainState], Params]  # the whole policy that answers
    sample: Sampler
    greedy: Sampler | None  # the likeliest answers, where they are the baseline
    score: ScoreRollout
    signal: Callable[[Judged], Array]  # [N] bool, which groups teach something
    replace: Callable[[Judged, Judged, Array], Judged]
    experience_of: ExperienceFn
    update: UpdateFn


def sample_groups(
    state: TrainState,
    batches: Callable[[int], PromptBatch],
    config: GRPOConfig,
    programs: GRPOPrograms,
    reward_of: RewardFn,
    put: Put,
) -> tuple[Judged, PromptBatch, dict[str, float]]:
    """Answers in groups; those without a signal replaced, as far as rounds allow.

    A group has no signal where all its answers that are trained on have the same score,
    before clipping and penalties: a length penalty alone would teach length, and an
    answer that is left out of the loss teaches nothing. Replacing such groups keeps the
    batch, and with it the step, of one size.

    Args:
        state: the policy that answers.
        batches: the prompts of round r, from 0.
        config: of the run.
        programs: compiled.
        reward_of: rewards of answers.
        put: places a batch on the devices.

    Returns:
        The answers, the prompt of each, and metrics: `reward/…`, `group/no_signal` and
        `rollout/tokens` are of all that was sampled, where those of the experience
        (`response/…`, `kl/…`, `group/score_std`) are of what was kept.

    References:
        Yu et al., 2025, arXiv:2503.14476, section 3.2, "dynamic sampling".
    """
    size = config.group_size
    rollout_key, _ = step_keys(state)
    keys = jax.random.split(rollout_key, config.resample + 1)
    judged = batch = signal = None
    rounds: list[dict[str, float]] = []
    for number, key in enumerate(keys):
        drawn_batch = batches(number).repeat(size)
        rollout = jax.block_until_ready(
            programs.sample(key, programs.answering(state), put(drawn_batch.prompts))
        )
        began = time.perf_counter()
        rewards = reward_of(rollout, drawn_batch)
        drawn = Judged(rollout=rollout, scores=put(rewards.scores))
        drawn_signal = np.asarray(programs.signal(drawn))
        scores, lengths = jax.device_get((drawn.scores, rollout.lengths))
        rounds.append(
            {
                "rollout/tokens": float(lengths.sum()),
                "reward/score_mean": float(scores.mean()),
                "reward/score_std": float(scores.std()),
                "time/reward_seconds": time.perf_counter() - began,
                **rewards.metrics,
            }
        )
        if config.groups.compares:
            rounds[-1]["group/no_signal"] = float(1.0 - drawn_signal.mean())
        if judged is None or batch is None or signal is None:
            judged, batch, signal = drawn, drawn_batch, drawn_signal
        else:
            index, signal = _fill(signal, drawn_signal, size)
            judged = programs.replace(judged, drawn, jnp.asarray(index))
            batch = batch.join(drawn_batch).take(index)
        if signal.all():
            break
    assert judged is not None and batch is not None and signal is not None
    metrics = {name: float(np.mean([r[name] for r in rounds])) for name in rounds[0]}
    for name in ("rollout/tokens", "reward/failures", "time/reward_seconds"):
        if name in metrics:
            metrics[name] *= len(rounds)
    if config.resample:
        metrics["group/resampled"] = float((len(rounds) - 1) * len(signal))
        metrics["group/kept_without_signal"] = float((~signal).sum())
    return judged, batch, metrics


def _fill(
    signal: np.ndarray, drawn_signal: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of old and new answers, one after the other, make the next batch.

    Args:
        signal: `[N]` bool, of the groups so far.
        drawn_signal: `[N]` bool, of the new ones.
        size: answers in a group.

    Returns:
        `[N · size]` indices, and `[N]` which of the groups now have a signal.
    """
    idle, fresh = np.flatnonzero(~signal), np.flatnonzero(drawn_signal)
    count = min(len(idle), len(fresh))
    groups = np.arange(len(signal))
    groups[idle[:count]] = len(signal) + fresh[:count]
    signal = signal.copy()
    signal[idle[:count]] = True
    return (groups[:, None] * size + np.arange(size)).ravel(), signal


def _has_signal(judged: Judged, *, config: GRPOConfig) -> Array:
    """`[N]` bool: raw scores differ among a group's answers that are trained on."""
    scores = judged.scores.reshape(-1, config.group_size)
    used = used_answers(judged.rollout, config.scores).reshape(scores.shape)
    best = jnp.max(jnp.where(used, scores, -jnp.inf), axis=1)
    worst = jnp.min(jnp.where(used, scores, jnp.inf), axis=1)
    return best > worst


def _replace_rows(kept: Judged, drawn: Judged, index: Array) -> Judged:
    """Rows `index` of the two, one after the other."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], kept, drawn)


def _answering(state: TrainState) -> Params:
    """What is trained of the policy that answers: the one that learns, or an older."""
    return state.params.actor if state.old_policy is None else state.old_policy


def _greedy_answers(
    state: TrainState,
    batch: PromptBatch,
    config: GRPOConfig,
    programs: GRPOPrograms,
    reward_of: RewardFn,
    put: Put,
) -> tuple[Judged, dict[str, float]]:
    """The likeliest answer to every prompt, once for each group, and what it adds."""
    assert programs.greedy is not None
    prompts = batch.take(range(0, len(batch.rows), config.group_size))
    unused_key, _ = step_keys(state)  # at temperature 0 nothing is drawn
    rollout = jax.block_until_ready(
        programs.greedy(unused_key, programs.answering(state), put(prompts.prompts))
    )
    began = time.perf_counter()
    rewards = reward_of(rollout, prompts)
    added = {
        "reward/greedy_mean": float(jnp.mean(rewards.scores)),
        "rollout/tokens": float(jnp.sum(rollout.lengths)),
        "time/reward_seconds": time.perf_counter() - began,
    }
    if "reward/failures" in rewards.metrics:
        added["reward/failures"] = rewards.metrics["reward/failures"]
    return Judged(rollout=rollout, scores=put(rewards.scores)), added
