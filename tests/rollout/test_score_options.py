"""`experience.py`: from scores to rewards, every option by hand or by oracle."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from rollout.option_cases import (
    AFTER,
    MASK,
    MOMENTS,
    RAW,
    SCORED,
    STATES,
    TRUNCATED,
    T,
    X,
    assert_learns,
    close,
    gae,
    rewards_of,
)

from rlhf_jax.algo.options import AdvantageOptions, ScoreOptions
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.rollout import make_experience
from rlhf_jax.rollout.experience import final_scores

scores_with = functools.partial(final_scores, SCORED.rollout, SCORED.scores)


def test_scores_are_normalised_clipped_and_penalised_in_this_order():
    # (s − ½) / ½ = [.5, −3.5, 4, −.25]; bounded by 2: [.5, −2, 2, −.25]; the third
    # was cut off and is halved: 1. Of 5 columns the last 2 are the ramp: lengths 3, 1,
    # 5, 4 cost 0, 0, 1, ½ of 3.
    options = ScoreOptions(
        normalization="running",
        clip=2.0,
        missing_eos="scale",
        missing_eos_penalty=0.5,
        overlong_buffer=2,
        overlong_penalty=3.0,
    )
    close(
        scores_with(options, MOMENTS),
        [0.5, -2.0, -2.0, -1.75],
    )
    # Each by itself.
    close(
        scores_with(ScoreOptions()),
        [0.75, -1.25, 2.5, 0.375],
    )
    normalized = ScoreOptions(normalization="reference")
    close(
        scores_with(normalized, MOMENTS),
        [0.5, -3.5, 4.0, -0.25],
    )
    with pytest.raises(ValueError, match="'reference': score_moments must be given"):
        scores_with(normalized)
    with pytest.raises(ValueError, match="'none': score_moments must be left out"):
        scores_with(ScoreOptions(), MOMENTS)
    close(
        scores_with(ScoreOptions(clip=1.0)),
        [0.75, -1.0, 1.0, 0.375],
    )
    ramp = ScoreOptions(overlong_buffer=4)
    close(scores_with(ramp), [0.25, -1.25, 1.5, -0.375])


def test_the_normalised_score_is_what_is_paid():
    options = ScoreOptions(normalization="running", clip=2.0)
    experience, metrics = make_experience(
        SCORED, kl_coef=0.0, scores=options, advantages=RAW, score_moments=MOMENTS
    )
    close(metrics["reward/normalization_mean"], 0.5)
    close(metrics["reward/normalization_std"], 0.5)
    assert_learns(experience, *gae(rewards_of([0.5, -2, 2, -0.25]), X["values"]))
    close(metrics["reward/score_mean"], X["scores"].mean())  # as the model said it


def test_answers_without_a_stop_are_left_out():
    options = dataclasses.replace(RAW, whiten="batch")
    experience, _ = make_experience(
        SCORED, kl_coef=0.0, scores=ScoreOptions(missing_eos="mask"), advantages=options
    )
    used = MASK & ~TRUNCATED[:, None]
    np.testing.assert_array_equal(experience.mask, used)
    advantages, returns = gae(rewards_of(X["scores"]), X["values"])
    want = np.zeros((4, T))
    want[used] = oracles.whiten(advantages[used], ddof=0)  # without the third answer
    close(experience.advantages, want)
    close(experience.returns, np.where(used, returns, 0))
    for name in ("old_logprobs", "ref_logprobs", "old_values"):
        np.testing.assert_array_equal(getattr(experience, name)[2], 0)
    # It is text like any other to the network.
    np.testing.assert_array_equal(experience.sequence_mask[2], [True] * 7)


@pytest.mark.parametrize("end_value", ["learned", "kept", "zero"])
def test_the_state_after_the_last_token(end_value):
    experience, _ = make_experience(
        SCORED,
        kl_coef=0.5,
        scores=dataclasses.replace(AFTER, end_value=end_value),
        advantages=RAW,
    )
    kl = 0.5 * (X["logprobs"] - X["ref_logprobs"])
    values = np.where(MASK, X["values"], 0) if end_value == "zero" else X["values"]
    advantages, returns = gae(
        rewards_of(X["scores"], kl=kl, states=STATES), values, STATES
    )
    learned = STATES if end_value == "learned" else MASK
    np.testing.assert_array_equal(experience.value_mask, learned)
    np.testing.assert_array_equal(experience.mask, MASK)
    assert_learns(experience, advantages, np.where(learned, returns, 0))
    close(experience.old_values, np.where(learned, X["values"], 0))


@pytest.mark.parametrize(
    ("scores", "values", "advantages", "returns"),
    [  # three tokens, score 1, γ = 1, λ = .95
        (
            ScoreOptions(),
            [0.1, 0.2, 0.3, np.nan, np.nan],
            [0.82675, 0.765, 0.7, 0, 0],
            [0.92675, 0.965, 1, 0, 0],
        ),
        (
            AFTER,
            [0.1, 0.2, 0.3, 0.7, np.nan],
            [0.8132125, 0.75075, 0.685, 0, 0],
            [0.9132125, 0.95075, 0.985, 1, 0],
        ),
        (
            dataclasses.replace(AFTER, end_value="kept"),
            [0.1, 0.2, 0.3, 0.7, np.nan],
            [0.8132125, 0.75075, 0.685, 0, 0],
            [0.9132125, 0.95075, 0.985, 0, 0],
        ),
        (
            dataclasses.replace(AFTER, end_value="zero"),
            [0.1, 0.2, 0.3, 0.7, np.nan],
            [0.781625, 0.7175, 0.65, 0, 0],
            [0.881625, 0.9175, 0.95, 0, 0],
        ),
    ],
    ids=["last token", "after it", "after it, kept", "after it, zero"],
)
def test_score_position_fixture(scores, values, advantages, returns):
    zeros = jnp.zeros((1, 5))
    one = ScoredRollout(
        rollout=Rollout(
            prompts=Prompts(
                tokens=jnp.ones((1, 1), jnp.int32), lengths=jnp.ones(1, jnp.int32)
            ),
            responses=jnp.ones((1, 5), jnp.int32),
            lengths=jnp.array([3]),
            truncated=jnp.array([False]),
            logprobs=zeros,
        ),
        logprobs=zeros,
        ref_logprobs=zeros,
        values=jnp.array([values]),
        scores=jnp.array([1.0]),
    )
    experience, _ = make_experience(
        one,
        kl_coef=0.1,
        scores=scores,
        advantages=AdvantageOptions(lam=0.95, whiten="none"),
    )
    close(experience.advantages, [advantages])
    close(experience.returns, [returns])


@pytest.mark.parametrize("scores", [ScoreOptions(), AFTER], ids=["last", "after"])
def test_rewards_scaled_over_the_states_that_are_paid(scores):
    experience, _ = make_experience(
        SCORED,
        kl_coef=0.5,
        scores=dataclasses.replace(scores, whiten_rewards=True),
        advantages=RAW,
    )
    states = MASK if scores == ScoreOptions() else STATES
    kl = 0.5 * (X["logprobs"] - X["ref_logprobs"])
    rewards = rewards_of(X["scores"], kl=kl, states=states)
    rewards[states] = oracles.whiten(rewards[states], ddof=0, center=False)
    assert_learns(experience, *gae(rewards, X["values"], states))
