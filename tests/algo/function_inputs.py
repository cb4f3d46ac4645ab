"""One batch of every array that a function of `rlhf_jax` reads, and its totals."""

import jax.numpy as jnp
import numpy as np

B, T, V, D, K = 16, 3, 5, 2, 3
SHARDS = 8  # of two rows each; the last has no tokens at all
PATTERNS = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 0]]
MASK = np.array([PATTERNS[b % 6] if b < B - 2 else [0, 0, 0] for b in range(B)], bool)

PADDED = (
    *("logprobs", "old_logprobs", "ref_logprobs", "rewards", "values", "old_values"),
    *("target_values", "returns", "advantages", "entropy", "weights"),
)
SHARED = {"unembedding"}  # every row uses all of it


def arrays(seed=3, *, mask=MASK, padding=np.nan, token=-1):
    """One batch: NaN, or other garbage, wherever there is no real token."""
    rng = np.random.default_rng(seed)
    x = {name: rng.normal(size=(B, T)) for name in PADDED}
    x |= {"logits": rng.normal(size=(B, T, V)), "hidden": rng.normal(size=(B, T, D))}
    for name, v in x.items():
        x[name] = np.where(mask.reshape(B, T, *[1] * (v.ndim - 2)), v, padding)
    x |= {
        "scores": rng.normal(size=B),
        "other_scores": rng.normal(size=B),
        "margin": rng.normal(size=B),
        "end_values": rng.normal(size=B),
        "kl_coef": rng.uniform(0.1, 1.0, size=B),
        "observed_kl": rng.uniform(5.0, 7.0, size=B),
        "samples": rng.normal(size=(B, K)),
        "next_logits": rng.normal(size=(B, V)),
        "outputs": rng.normal(size=(B, T + 1, V)),
        "unembedding": rng.normal(size=(D, V)),
    }
    x = {k: jnp.asarray(v, jnp.float32) for k, v in x.items()}
    tokens = np.where(mask, rng.integers(0, V, (B, T)), token)
    return x | {
        "mask": jnp.asarray(mask),
        "value_mask": jnp.asarray(mask & (np.arange(T) != 1)),
        "truncated": jnp.asarray(rng.random(B) < 0.5),
        "tokens": jnp.asarray(tokens, jnp.int32),
        "lengths": jnp.asarray(mask.sum(axis=1), jnp.int32),
        "ids": jnp.asarray(np.arange(B) // 2 * 7 - 3, jnp.int32),
    }


def one_token(x, row):
    """One row of one token, or of none."""
    shapes = {"outputs": 2, "samples": K, "next_logits": V}  # columns that remain
    return {
        k: v
        if k in SHARED
        else v[row : row + 1, *[slice(shapes.get(k, 1))] * (v.ndim > 1)]
        for k, v in x.items()
    }


def totals(x):
    """What a minibatch hands to its parts."""
    rows = jnp.any(x["mask"], axis=1)
    return {
        "num_tokens": jnp.sum(x["mask"].astype(jnp.float32)),
        "num_sequences": jnp.sum(rows.astype(jnp.float32)),
    }


def token_total(x):
    return {"num_tokens": totals(x)["num_tokens"]}


def value_totals(x):
    tokens = jnp.sum(x["value_mask"].astype(jnp.float32))
    return totals(x) | {"num_tokens": tokens}


def ppo_totals(x):
    return totals(x) | {"num_value_tokens": value_totals(x)["num_tokens"]}
