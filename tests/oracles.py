"""The formulas once more, as float64 NumPy loops that follow the papers' notation.

Nothing here imports `rlhf_jax`. A test compares the package with these, so they are
written for being obviously right: one sequence, one token at a time.
"""

import numpy as np


def gae_row(r, v, m, gamma, lam):
    """GAE of one row with masked gaps: gaps pass A and V_next through."""
    adv, running, next_v = np.zeros(len(r)), 0.0, 0.0
    for t in reversed(range(len(r))):
        if not m[t]:
            continue
        running = r[t] + gamma * next_v - v[t] + gamma * lam * running
        next_v = v[t]
        adv[t] = running
    return adv


def gae_series(r, v, gamma, lam):
    """GAE of one full row by its definition, A_t = Σ_k (γλ)^k δ_{t+k}."""
    v_next = np.append(v[1:], 0.0)
    delta = r + gamma * v_next - v
    return np.array(
        [
            sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t))
            for t in range(len(r))
        ]
    )


def n_step_row(r, v, n, gamma):
    """n-step returns of one full row."""
    returns = np.zeros(len(r))
    for t in range(len(r)):
        end = min(t + n, len(r))
        returns[t] = sum(gamma ** (k - t) * r[k] for k in range(t, end))
        if t + n < len(r):
            returns[t] += gamma**n * v[t + n]
    return returns


def whiten(x, ddof, eps=1e-8, center=True):
    """Whitening of a flat array."""
    z = (x - x.mean()) / np.sqrt(x.var(ddof=ddof) + eps)
    return z if center else z + x.mean()


def adapt(beta, kl, target, n, horizon):
    """The adaptive KL coefficient as published, without a lower bound."""
    return beta * (1 + np.clip(kl / target - 1, -0.2, 0.2) * n / horizon)


def log_softmax(logits):
    """Over the last axis, float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def entropy(logits):
    """Over the last axis, float64, with 0 · log 0 = 0."""
    logp = log_softmax(logits)
    return -np.where(np.isneginf(logp), 0.0, np.exp(logp) * logp).sum(axis=-1)


def truncated_distribution(logits, temperature, top_k, top_p, min_p):
    """Probabilities of one row after each filter in turn, by sorting; no ties."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    order = np.argsort(-p)
    if top_k is not None:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    if top_p is not None:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0.0
        p /= p.sum()
    if min_p is not None:
        p[p < min_p * p.max()] = 0.0
        p /= p.sum()
    return p


def enumerate_kl(theta, ref):
    """Exact expectations over a vocabulary; `score[a]` is ∇_θ log π(a)."""
    p = np.exp(theta - theta.max())
    p /= p.sum()
    ell, score = np.log(p / ref), np.eye(len(p)) - p

    def expect(weight):
        return (p[:, None] * weight[:, None] * score).sum(0)

    return {
        "pi": p,
        "ell": ell,
        "kl": (p * ell).sum(),
        "E_k2": (p * ell**2 / 2).sum(),
        "E_k3": (p * (np.exp(-ell) - 1 + ell)).sum(),
        "grad_kl": p * (ell - (p * ell).sum()),
        "grad_kl_ref_pi": p - ref,
        "E_reward_minus_k1": -expect(ell),
        "E_reward_minus_k3": -expect(np.exp(-ell) - 1 + ell),
    }


def ppo_terms(logprobs, old_logprobs, advantages, low, high):
    """The clipped surrogate, token by token."""
    loss = np.zeros(logprobs.shape)
    for i in np.ndindex(logprobs.shape):
        ratio = np.exp(float(logprobs[i]) - float(old_logprobs[i]))
        a = float(advantages[i])
        bounded = min(max(ratio, 1 - low), 1 + high)
        loss[i] = -min(ratio * a, bounded * a)
    return loss


def value_terms(values, old_values, returns, eps):
    """The clipped value loss, token by token."""
    loss = np.zeros(values.shape)
    for i in np.ndindex(values.shape):
        v, old, ret = float(values[i]), float(old_values[i]), float(returns[i])
        clipped = old + min(max(v - old, -eps), eps)
        loss[i] = max((v - ret) ** 2, (clipped - ret) ** 2) / 2
    return loss
