"""One batch for the options of `make_experience`, and oracles of what it comes to.

Answers of 3, 1, 5 and 4 tokens in 5 columns; the third was cut off.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import oracles

from rlhf_jax.algo.options import AdvantageOptions, ScoreOptions
from rlhf_jax.algo.scores import ScoreMoments
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout

T = 5
LENGTHS = np.array([3, 1, 5, 4])
TRUNCATED = np.array([False, False, True, False])
MASK = np.arange(T) < LENGTHS[:, None]
STATES = np.arange(T) < np.minimum(LENGTHS + 1, T)[:, None]  # one state more
GAMMA, LAM = 0.9, 0.8
RAW = AdvantageOptions(gamma=GAMMA, lam=LAM, whiten="none")
AFTER = ScoreOptions(position="after_last_token")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
close = partial(np.testing.assert_allclose, **TOLERANCE)
MOMENTS = ScoreMoments(
    count=jnp.float32(4), mean=jnp.float32(0.5), squares=jnp.float32(1.0)
)  # mean ½, variance ¼


def _draw():
    """Arrays of one batch in float64; padding holds NaN where nothing may read it."""
    rng = np.random.default_rng(0)
    shape = (4, T)
    x = {
        "values": np.where(STATES, rng.normal(0, 1, shape), np.nan),
        "target_values": np.where(STATES, rng.normal(0, 1, shape), np.nan),
        "logprobs": np.where(MASK, rng.normal(-2, 0.5, shape), np.nan),
        "ref_logprobs": np.where(MASK, rng.normal(-2, 0.5, shape), np.nan),
        "sampler": np.where(MASK, rng.normal(-2, 0.5, shape), np.nan),
        "scores": np.array([0.75, -1.25, 2.5, 0.375]),
        "end_values": np.array([9.5, 8.5, 0.625, 7.5]),
    }
    # As the package will see them.
    return {name: np.float32(array).astype(np.float64) for name, array in x.items()}


X = _draw()


def _score(x):
    def array(name):
        return jnp.asarray(x[name], jnp.float32)

    return ScoredRollout(
        rollout=Rollout(
            prompts=Prompts(
                tokens=jnp.ones((4, 2), jnp.int32), lengths=jnp.array([2, 1, 2, 1])
            ),
            responses=jnp.ones((4, T), jnp.int32),
            lengths=jnp.asarray(LENGTHS),
            truncated=jnp.asarray(TRUNCATED),
            logprobs=array("sampler"),
        ),
        logprobs=array("logprobs"),
        ref_logprobs=array("ref_logprobs"),
        values=array("values"),
        scores=array("scores"),
    )


SCORED = _score(X)


def rewards_of(scores, *, kl=0.0, states=MASK):
    """The score in the last state of each row, minus what the KL costs."""
    rewards = -np.where(MASK, kl, 0.0)
    rewards[range(4), states.sum(axis=1) - 1] += scores
    return rewards


def gae(rewards, values, states=MASK, lam=LAM):
    """Advantages and returns, row by row; `lam` may be one per row."""
    rows = zip(rewards, values, states, np.broadcast_to(lam, 4), strict=True)
    advantages = np.array([oracles.gae_row(r, v, m, GAMMA, k) for r, v, m, k in rows])
    return advantages, np.where(states, advantages + values, 0)


def assert_learns(experience, advantages, returns):
    close(experience.advantages, np.where(MASK, advantages, 0))
    close(experience.returns, returns)
