"""Policy losses once more, as float64 NumPy loops.

Nothing here imports `rlhf_jax`. `x` are the log-probabilities in training, `frozen` the
same wherever the paper stops the gradient: differences in `x` alone are the gradient.
All are of one row without padding, but in `by_rows` and `kl_cov`.
"""

import numpy as np


def by_rows(term, x, frozen, old, advantages, mask, **options):
    """`term(x, frozen, old, advantages, t, …)` at every real token of every row."""
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        (real,) = np.nonzero(row)
        arrays = [
            np.asarray(z, np.float64)[b, real] for z in (x, frozen, old, advantages)
        ]
        for t, column in enumerate(real):
            out[b, column] = term(*arrays, t, **options)
    return out


def clip(x, low, high):
    """x, or the bound that it is beyond."""
    return min(max(x, low), high)


def clipped(ratio, a, low, high):
    """PPO's loss of one ratio."""
    return -min(ratio * a, clip(ratio, 1 - low, 1 + high) * a)


def bounded_log_ratio(log_ratio, a, low, high):
    """GMPO's clip: only against the way the advantage pulls."""
    return min(log_ratio, high) if a > 0 else max(log_ratio, -low)


def reinforce(x, frozen, old, a, t):
    """Plain policy gradient."""
    return -a[t] * x[t]


def ppo(x, frozen, old, a, t, low, high):
    """Each token's own ratio."""
    return clipped(np.exp(x[t] - old[t]), a[t], low, high)


def gspo(x, frozen, old, a, t, low, high):
    """The sequence's ratio, moved by token t."""
    s = np.exp(np.mean(frozen - old)) * np.exp(x[t] - frozen[t])
    return clipped(s, a[t], low, high)


def gspo_sequence(x, old, a, low, high):
    """One number per row; nothing is frozen, `a` is a scalar."""
    return clipped(np.exp(np.mean(x - old)), a, low, high)


def geometric_mean(x, frozen, old, a, t, low, high):
    """The geometric mean of the clipped ratios, moved by token t."""
    logs = [bounded_log_ratio(*z, low, high) for z in zip(frozen - old, a, strict=True)]
    own = bounded_log_ratio(x[t] - old[t], a[t], low, high) - logs[t]
    return -a[t] * np.exp(np.mean(logs)) * np.exp(own)


def geometric_mean_sequence(x, old, a, low, high):
    """One number per row; nothing is frozen, `a` is a scalar."""
    logs = [bounded_log_ratio(log, a, low, high) for log in x - old]
    return -np.exp(np.mean(logs)) * a


def cispo(x, frozen, old, a, t, low, high):
    """Policy gradient with a clipped, frozen weight; the bounds are of the ratio."""
    return -clip(np.exp(frozen[t] - old[t]), low, high) * a[t] * x[t]


def sapo(x, frozen, old, a, t, positive, negative):
    """The soft gate."""
    tau = positive if a[t] > 0 else negative
    gate = 1 / (1 + np.exp(-tau * (np.exp(x[t] - old[t]) - 1)))
    return -4 / tau * gate * a[t]


def kl_cov(x, frozen, old, advantages, mask, count, coef):
    """A penalty at the `count` real tokens of largest covariance."""
    x, frozen, old, a = (
        np.asarray(z, np.float64) for z in (x, frozen, old, advantages)
    )
    cov = (a - a[mask].mean()) * (frozen - frozen[mask].mean())
    out = np.where(mask, -np.exp(x - old) * a, 0.0)
    by_cov = sorted(zip(*np.nonzero(mask), strict=True), key=lambda i: -cov[i])
    for i in by_cov[:count]:
        out[i] += coef * abs(x[i] - old[i])
    return out
