"""`experience.py`: one case by hand, and what must not matter to it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.options import AdvantageOptions, KLOptions, ScoreOptions
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.rollout import make_experience

NAN = np.nan
MASK = np.array([[True, True, False], [True, True, True]])

# β = 0.1, γ = 1, λ = 0.5; an answer without a stop token loses 1.
#
# row 0, score .75      kl = [-1 + 1.5, -.5 + .25]             = [.5, -.25]
#   r = [-.05, .75 + .025]                                     = [-.05, .775]
#   V = [.2, .4]        δ = [-.05 + .4 - .2, .775 - .4]        = [.15, .375]
#   A = [.15 + .5·.375, .375]                                  = [.3375, .375]
#   R = A + V                                                  = [.5375, .775]
#
# row 1, truncated, score .25 - 1 = -.75    kl = [0, .2, .5]
#   r = [0, -.02, -.75 - .05]                                  = [0, -.02, -.8]
#   V = [.1, .3, -.2]   δ = [.3 - .1, -.02 - .2 - .3, -.8 + .2] = [.2, -.52, -.6]
#   A_2 = -.6,  A_1 = -.52 - .3 = -.82,  A_0 = .2 - .41        = [-.21, -.82, -.6]
#   R = A + V                                                  = [-.11, -.52, -.8]
ADVANTAGES = np.array([[0.3375, 0.375, 0.0], [-0.21, -0.82, -0.6]])
RETURNS = np.array([[0.5375, 0.775, 0.0], [-0.11, -0.52, -0.8]])
OPTIONS = {
    "kl_coef": 0.1,
    "scores": ScoreOptions(missing_eos="subtract"),
    "advantages": AdvantageOptions(lam=0.5),
}
RAW = AdvantageOptions(lam=1.0, whiten="none")


@pytest.fixture
def scored():
    return ScoredRollout(
        rollout=Rollout(
            prompts=Prompts(
                tokens=jnp.array([[0, 8], [7, 9]]), lengths=jnp.array([1, 2])
            ),
            responses=jnp.array([[3, 2, 5], [4, 6, 5]]),
            lengths=jnp.array([2, 3]),
            truncated=jnp.array([False, True]),
            logprobs=jnp.full((2, 3), NAN),  # `scored.logprobs` counts
        ),
        logprobs=jnp.array([[-1.0, -0.5, NAN], [-2.0, -1.0, -0.5]]),
        ref_logprobs=jnp.array([[-1.5, -0.25, np.inf], [-2.0, -1.2, -1.0]]),
        values=jnp.array([[0.2, 0.4, 1e6], [0.1, 0.3, -0.2]]),
        scores=jnp.array([0.75, 0.25]),
    )


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_by_hand(maybe_jit, scored):
    fn = maybe_jit(
        partial(
            make_experience,
            **OPTIONS | {"advantages": AdvantageOptions(lam=0.5, whiten="none")},
        )
    )
    experience, metrics = fn(scored)
    np.testing.assert_array_equal(experience.tokens, [[0, 8, 3, 2, 5], [7, 9, 4, 6, 5]])
    np.testing.assert_array_equal(
        experience.sequence_mask, [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(experience.mask, MASK)
    close(experience.advantages, ADVANTAGES)
    close(experience.returns, RETURNS)
    close(experience.old_logprobs, [[-1.0, -0.5, 0.0], [-2.0, -1.0, -0.5]])
    close(experience.ref_logprobs, [[-1.5, -0.25, 0.0], [-2.0, -1.2, -1.0]])
    close(experience.old_values, [[0.2, 0.4, 0.0], [0.1, 0.3, -0.2]])

    # Σ kl = .25 and .7 over 5 tokens; Σ r = .725 and -.82; Σ V = .9; Σ R = -.1175.
    variance = lambda x: np.var(x[MASK])  # noqa: E731
    want = {
        "reward/score_mean": 0.5,  # of what the reward model said
        "reward/score_std": 0.25,
        "reward/shaped_mean": -0.0475,
        "kl/sequence": 0.475,
        "kl/token": 0.19,
        "kl/coef": 0.1,
        "value/explained_variance": 1 - variance(ADVANTAGES) / variance(RETURNS),
        "value/mean": 0.16,
        "value/return_mean": -0.0235,
        "response/length_mean": 2.5,
        "response/stop_rate": 0.5,
        "response/distinct": 1.0,
    }
    assert set(metrics) == set(want)
    for name, value in want.items():
        close(metrics[name], value)
        assert metrics[name].dtype == jnp.float32 and metrics[name].shape == ()


def test_whitening_takes_all_real_tokens_of_the_batch_and_leaves_returns(scored):
    experience, _ = make_experience(scored, **OPTIONS)
    flat = ADVANTAGES[MASK]
    close(experience.advantages[MASK], (flat - flat.mean()) / flat.std())
    assert experience.advantages[0, 2] == 0
    close(experience.returns, RETURNS)


@pytest.mark.parametrize(
    ("options", "last_reward"),
    [
        ({"missing_eos": "keep"}, 0.25),
        ({"missing_eos": "subtract", "missing_eos_penalty": 1.5}, 0.25 - 1.5),
        ({"missing_eos": "replace", "missing_eos_penalty": -1.0}, -1.0),
        ({"missing_eos": "scale", "missing_eos_penalty": 0.5}, 0.125),
    ],
    ids=["keep", "subtract", "replace", "scale"],
)
def test_answers_without_a_stop_token(scored, options, last_reward):
    experience, metrics = make_experience(
        scored, kl_coef=0.0, advantages=RAW, scores=ScoreOptions(**options)
    )
    # λ = γ = 1 and no KL: every return is the score.
    close(experience.returns, [[0.75, 0.75, 0.0], [last_reward] * 3])
    close(metrics["reward/score_mean"], 0.5)


def test_discount(scored):
    experience, _ = make_experience(
        scored, kl_coef=0.0, advantages=dataclasses.replace(RAW, gamma=0.5)
    )
    close(experience.returns, [[0.375, 0.75, 0.0], [0.0625, 0.125, 0.25]])


def test_the_estimator_shapes_rewards_but_the_reported_kl_is_the_log_ratio(scored):
    experience, metrics = make_experience(
        scored, kl_coef=0.1, kl=KLOptions(estimator="k2"), advantages=RAW
    )
    # ½·kl²: [.125, .03125] and [0, .02, .125]; returns are sums from each token on.
    close(
        experience.returns,
        [
            [0.75 - 0.015625, 0.75 - 0.003125, 0.0],
            [0.25 - 0.0145, 0.25 - 0.0145, 0.25 - 0.0125],
        ],
    )
    close(metrics["kl/sequence"], 0.475)


@pytest.mark.parametrize("garbage", [NAN, np.inf, -1e6])
def test_padding_is_never_read(scored, garbage):
    fn = jax.jit(partial(make_experience, **OPTIONS))
    dirty = dataclasses.replace(
        scored,
        **{
            name: jnp.where(MASK, getattr(scored, name), garbage)
            for name in ("logprobs", "ref_logprobs", "values")
        },
    )
    jax.tree.map(np.testing.assert_array_equal, fn(dirty), fn(scored))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fn(dirty)))


def test_the_order_of_the_batch_does_not_matter(scored):
    fn = jax.jit(partial(make_experience, **OPTIONS))
    experience, metrics = fn(scored)
    turned, turned_metrics = fn(jax.tree.map(lambda x: x[::-1], scored))
    jax.tree.map(close, turned, jax.tree.map(lambda x: x[::-1], experience))
    jax.tree.map(close, turned_metrics, metrics)
