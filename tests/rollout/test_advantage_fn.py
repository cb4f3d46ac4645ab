"""Estimators of one's own in `make_experience` and `make_group_experience`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from rollout.option_cases import (
    AFTER,
    MASK,
    SCORED,
    STATES,
    TRUNCATED,
    T,
    X,
    close,
    rewards_of,
)

from rlhf_jax.algo.advantages import gae as estimate
from rlhf_jax.algo.options import (
    AdvantageOptions,
    GroupOptions,
    KLOptions,
    ScoreOptions,
)
from rlhf_jax.rollout import make_experience, make_group_experience

NO_KL = KLOptions(place="none")
group_experience = partial(make_group_experience, SCORED, group_size=2, kl_coef=0.25)


def test_an_estimator_of_ones_own_in_place_of_the_options():
    options = AdvantageOptions(lam=0.5, gamma=0.75, whiten="none")
    plain, _ = make_experience(SCORED, kl_coef=0.0, advantages=options)
    mine = partial(estimate, gamma=0.75, lam=0.5)
    raw = AdvantageOptions(whiten="none")
    experience, _ = make_experience(
        SCORED, kl_coef=0.0, advantages=raw, advantage_fn=mine
    )
    jax.tree.map(np.testing.assert_array_equal, experience, plain)
    # Whitening is after it.
    whitened, _ = make_experience(SCORED, kl_coef=0.0, advantage_fn=mine)
    want = np.zeros((4, T))
    want[MASK] = oracles.whiten(np.asarray(plain.advantages, np.float64)[MASK], ddof=0)
    close(whitened.advantages, want)
    np.testing.assert_array_equal(whitened.returns, plain.returns)


def test_an_estimator_gets_token_rewards_values_and_states():
    got = {}

    def keep(rewards, values, mask):
        got.update(rewards=rewards, values=values, mask=mask)
        return 2 * rewards, 3 * values

    experience, _ = make_experience(
        SCORED,
        kl_coef=0.25,
        scores=AFTER,
        advantages=AdvantageOptions(whiten="none"),
        advantage_fn=keep,
    )
    paid = 0.25 * (X["logprobs"] - X["ref_logprobs"])
    rewards = rewards_of(X["scores"], kl=paid, states=STATES)
    close(got["rewards"], rewards)
    close(got["values"], np.where(STATES, X["values"], 0))
    np.testing.assert_array_equal(got["mask"], STATES)
    close(experience.advantages, np.where(MASK, 2 * rewards, 0))
    close(experience.returns, np.where(STATES, 3 * X["values"], 0))


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.9},
        {"lam": 0.5},
        {"value_lam": 1.0},
        {"lam_alpha": 0.5},
        {"n_steps": 2},
        {"bootstrap_truncated": True},
        {"slow_critic_decay": 0.9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_an_estimator_would_not_read_are_refused(options):
    field = next(iter(options)).replace("_", "-")
    with pytest.raises(
        ValueError, match=rf"^advantages\.{field}=.*: has no effect with advantage_fn"
    ):
        make_experience(
            SCORED,
            kl_coef=0.0,
            advantages=AdvantageOptions(**options),
            advantage_fn=estimate,
        )


# ---- without a critic ----


def against_the_mildest(rewards, mask, group_size):
    """By the lowest of the group: no option does that."""
    worth = rewards.sum(axis=1).reshape(-1, group_size)
    gain = worth - jnp.min(worth, axis=1, keepdims=True)
    return jnp.where(mask, gain.reshape(-1)[:, None], 0.0)


def test_a_baseline_that_no_option_names():
    # ¾, −1¼ | 2½, ⅜: the lowest are −1¼ and ⅜.
    experience, metrics = group_experience(kl=NO_KL, advantage_fn=against_the_mildest)
    want = np.array([2, 0, 2.125, 0])[:, None]
    close(experience.advantages, np.where(MASK, want, 0.0))
    close(metrics["group/score_std"], (1 + 2.125 / 2) / 2)
    # An answer that is left out is compared with, and not trained on.
    experience, _ = group_experience(
        kl=NO_KL,
        scores=ScoreOptions(missing_eos="mask"),
        advantage_fn=against_the_mildest,
    )
    close(experience.advantages, np.where(MASK & ~TRUNCATED[:, None], want, 0.0))


def test_a_median_for_a_baseline():
    def against_the_median(rewards, mask, group_size):
        worth = rewards.sum(axis=1).reshape(-1, group_size)
        gain = worth - jnp.median(worth, axis=1, keepdims=True)
        return jnp.where(mask, gain.reshape(-1)[:, None], 0.0)

    # −1¼, ⅜, ¾, 2½: the median is 9/16.
    experience, _ = group_experience(
        kl=NO_KL, group_size=4, advantage_fn=against_the_median
    )
    want = np.array([3, -29, 31, -3])[:, None] / 16
    close(experience.advantages, np.where(MASK, want, 0.0))


def test_what_an_estimator_gets():
    got = {}

    def keep(rewards, mask, group_size):
        got.update(rewards=rewards, mask=mask, size=group_size)
        return jnp.full(mask.shape, 0.5)

    experience, _ = group_experience(advantage_fn=keep)
    paid = 0.25 * (X["logprobs"] - X["ref_logprobs"])
    close(got["rewards"], rewards_of(X["scores"], kl=paid))
    np.testing.assert_array_equal(got["mask"], MASK)
    assert got["size"] == 2
    np.testing.assert_array_equal(experience.advantages, np.where(MASK, 0.5, 0.0))


def test_options_of_groups_beside_an_estimator_are_refused():
    groups = GroupOptions(scale="tokens")
    with pytest.raises(ValueError, match=r"^groups=.*: has no effect with advantage_"):
        group_experience(groups=groups, advantage_fn=against_the_mildest)
