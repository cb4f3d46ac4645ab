"""The pieces the transcriptions share: records, loops over tokens, a random batch.

Nothing here imports `rlhf_jax`. Everything is float64 and goes one token at a time, so
a column that is not meant to be read is not read, whatever it holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CLIP_RANGE = 0.2  # of the policy ratio; all six implementations ship this number


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rollout and the network's outputs in one update. B rows, T columns.

    Column `t` of the log-probabilities is response token `t`; column `t` of the values
    is the state before that token.
    """

    scores: np.ndarray
    """[B] of the reward model."""
    lengths: np.ndarray
    """[B] response tokens through the stop token, 1..T."""
    truncated: np.ndarray
    """[B] bool: no stop token before the limit; then the length is T."""
    old_logprobs: np.ndarray
    """[B, T] of the policy that sampled."""
    ref_logprobs: np.ndarray
    """[B, T] of the frozen reference."""
    old_values: np.ndarray
    """[B, T]; column `lengths[b]`, the state after the last token, is real, too."""
    new_logprobs: np.ndarray
    """[B, T] of the policy being trained."""
    new_values: np.ndarray
    """[B, T], real through column `lengths[b]` like `old_values`."""
    kl_coef: float
    """β at this step."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What one implementation makes of a `Batch`. Arrays are [B, T].

    `rewards` are 0 in columns that reach no advantage, `advantages` outside the policy
    loss and `returns` outside the value loss, also where the original leaves other
    numbers in those places: nothing reads them.
    """

    rewards: np.ndarray
    advantages: np.ndarray
    """As they enter the policy loss."""
    returns: np.ndarray
    """Targets of the value loss, never whitened."""
    policy_loss: float
    value_loss: float
    """With its ½, without the value coefficient."""
    logprob_gradient: np.ndarray
    """d policy_loss / d new_logprobs."""
    value_gradient: np.ndarray
    """d (coefficient · value_loss) / d new_values."""
    next_kl_coef: float


def whiten(values: Sequence[float], *, ddof: int, center: bool = True) -> list[float]:
    """(x − mean)/√(variance + 1e-8), with the mean added back where not centred."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - ddof)
    scale = 1.0 / math.sqrt(variance + 1e-8)
    return [(x - mean) * scale + (0.0 if center else mean) for x in values]


def whiten_columns(
    values: np.ndarray, columns: Sequence[int], *, ddof: int, center: bool = True
) -> np.ndarray:
    """Whitens the first `columns[b]` entries of each row b as one set; 0 elsewhere."""
    places = [(b, t) for b, n in enumerate(columns) for t in range(n)]
    whitened = np.zeros(values.shape)
    flat = whiten([values[place] for place in places], ddof=ddof, center=center)
    for place, value in zip(places, flat, strict=True):
        whitened[place] = value
    return whitened


def gae_row(rewards: np.ndarray, values: np.ndarray, lam: float) -> np.ndarray:
    """Advantages of one row without a mask; value 0 behind its end; γ = 1."""
    advantages = np.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        last = t + 1 == len(rewards)
        delta = rewards[t] + (0.0 if last else values[t + 1]) - values[t]
        advantages[t] = delta + (0.0 if last else lam * advantages[t + 1])
    return advantages


def adapted_kl_coef(
    beta: float, kl: float, *, target: float, episodes: int, horizon: int
) -> float:
    """The proportional controller of Ziegler et al. (2019), without a lower bound."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * episodes / horizon)


def policy_token(
    log_ratio: float,
    advantage: float,
    *,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
) -> tuple[float, float]:
    """Clipped loss of one token, and its derivative by the new log-probability."""
    clamped = log_ratio
    if log_ratio_clamp is not None:
        clamped = min(max(log_ratio, -log_ratio_clamp), log_ratio_clamp)
    ratio = math.exp(clamped)
    free = -advantage * ratio
    held = -advantage * min(max(ratio, 1.0 - CLIP_RANGE), 1.0 + CLIP_RANGE)
    # Inside the range the two are one number, and d(−A·e^x)/dx is −A·e^x again.
    loss, slope = (free, free) if free >= held else (held, 0.0)
    if dual_clip is not None and advantage < 0 and loss > -advantage * dual_clip:
        loss, slope = -advantage * dual_clip, 0.0
    if clamped != log_ratio:
        slope = 0.0
    return loss, slope


def value_token(
    new: float, old: float, target: float, clip: float
) -> tuple[float, float]:
    """Larger squared error of one state, without the ½, and its derivative by `new`."""
    nearest = min(max(new, old - clip), old + clip)
    free, held = (new - target) ** 2, (nearest - target) ** 2
    return (free, 2.0 * (new - target)) if free >= held else (held, 0.0)


def ppo_losses(
    batch: Batch,
    advantages: np.ndarray,
    returns: np.ndarray,
    *,
    policy_columns: Sequence[int],
    value_columns: Sequence[int],
    value_clip: float,
    value_coef: float,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    microbatches: int = 1,
) -> dict:
    """Losses and gradients; row b takes part with its first `..._columns[b]` columns.

    Each of `microbatches` contiguous groups of rows is averaged over its own tokens,
    and the loss is the mean of these means.
    """
    rows = len(batch.scores)
    if rows % microbatches:
        raise ValueError(f"microbatches={microbatches} does not divide {rows} rows")
    policy_loss, value_loss = 0.0, 0.0
    logprob_gradient = np.zeros(batch.new_logprobs.shape)
    value_gradient = np.zeros(batch.new_values.shape)
    for group in np.split(np.arange(rows), microbatches):
        per_token = 1.0 / microbatches / sum(policy_columns[b] for b in group)
        per_state = 0.5 / microbatches / sum(value_columns[b] for b in group)
        for b in group:
            for t in range(policy_columns[b]):
                loss, slope = policy_token(
                    batch.new_logprobs[b, t] - batch.old_logprobs[b, t],
                    advantages[b, t],
                    dual_clip=dual_clip,
                    log_ratio_clamp=log_ratio_clamp,
                )
                policy_loss += per_token * loss
                logprob_gradient[b, t] = per_token * slope
            for t in range(value_columns[b]):
                loss, slope = value_token(
                    batch.new_values[b, t],
                    batch.old_values[b, t],
                    returns[b, t],
                    value_clip,
                )
                value_loss += per_state * loss
                value_gradient[b, t] = value_coef * per_state * slope
    return {
        "policy_loss": float(policy_loss),
        "value_loss": float(value_loss),
        "logprob_gradient": logprob_gradient,
        "value_gradient": value_gradient,
    }


def random_batch(seed: int, batch: int = 6, length: int = 7) -> Batch:
    """Ragged rows with something for every branch of the six implementations.

    Responses of one token, of the full width with a stop token and of the full width
    without; scores beyond ±5 and ±10; one KL beyond 10 and one below −10; ratios below
    .8, inside the clip range, above 1.2 and above 3; values that moved by less than .2,
    by .2 to .5 and by more. Every column holds a plausible number, also behind a
    response. Needs at least 4 rows and 3 columns.
    """
    rng = np.random.default_rng(seed)
    shape = (batch, length)

    def one_of(*centres):  # each as often as the others, a little jittered, shuffled
        picked = np.resize(np.asarray(centres), batch * length)
        return rng.permutation(picked + rng.uniform(-0.04, 0.04, len(picked)))

    lengths = rng.integers(1, length + 1, batch)
    lengths[:4] = 1, length, length, length - 1
    truncated = (lengths == length) & (rng.uniform(size=batch) < 0.5)
    truncated[:4] = False, False, True, False
    scores = rng.normal(0.2, 1.5, batch)
    scores[:4] = np.array([0.63, 6.4, -1.7, -11.3]) + rng.uniform(-0.3, 0.3, 4)
    old = rng.uniform(-4.0, -0.3, shape)
    ref = old - rng.normal(0.1, 0.5, shape)
    ref[1, 0], ref[3, 1] = old[1, 0] - 12.6, old[3, 1] + 11.7
    values = rng.normal(0.3, 0.8, shape)
    drift = one_of(-0.7, -0.3, -0.1, 0.05, 0.12, 0.4, 0.8, 1.4).reshape(shape)
    step = one_of(-1.1, -0.7, -0.35, -0.1, 0.1, 0.35, 0.7, 1.1).reshape(shape)
    order = rng.permutation(batch)
    return Batch(
        scores=scores[order],
        lengths=lengths[order],
        truncated=truncated[order],
        old_logprobs=old[order],
        ref_logprobs=ref[order],
        old_values=values[order],
        new_logprobs=(old + drift)[order],
        new_values=(values + step)[order],
        kl_coef=0.15,
    )
