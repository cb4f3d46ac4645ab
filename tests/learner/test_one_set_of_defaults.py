"""What is left unsaid means the same in a function, in its options and in a method."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo import advantages, kl, losses, masking, off_policy, policy_losses
from rlhf_jax.algo import rewards as token_rewards
from rlhf_jax.algo.options import (
    AdvantageOptions,
    GroupOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
    ValueLossOptions,
)
from rlhf_jax.algo.scores import soft_overlong_penalty
from rlhf_jax.algo.types import Experience
from rlhf_jax.config.grpo import GRPOMethod
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.learner import objectives
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.rollout import experience, group_experience

OF_ACTOR = {
    "clip_eps": "clip_eps",
    "clip_eps_high": "clip_eps_high",
    "dual_clip": "dual_clip",
    "log_ratio_clamp": "log_ratio_clamp",
    "entropy_coef": "entropy_coef",
    "aggregation": "aggregation",
}
# Keyword of a function → field of the options that stand for it on the command line.
SAME = {
    (kl.kl_estimate, KLOptions): {
        "estimator": "estimator",
        "straight_through": "straight_through",
        "log_ratio_clamp": "log_ratio_clamp",
        "clamp": "clamp",
    },
    (token_rewards.shape_rewards, KLOptions): {
        "estimator": "estimator",
        "log_ratio_clamp": "log_ratio_clamp",
        "clamp": "clamp",
    },
    (token_rewards.shape_rewards, ScoreOptions): {"score_position": "position"},
    (advantages.gae, AdvantageOptions): {"gamma": "gamma", "lam": "lam"},
    (masking.masked_whiten, AdvantageOptions): {
        "center": "center",
        "ddof": "ddof",
        "shards": "whiten_shards",
    },
    (losses.clipped_value_loss, ValueLossOptions): {
        "clip_eps": "clip_eps",
        "half": "half",
    },
    (losses.critic_loss, ValueLossOptions): {
        "value_clip_eps": "clip_eps",
        "half": "half",
    },
    (losses.critic_loss, PolicyLossOptions): {"aggregation": "aggregation"},
    (losses.actor_loss, PolicyLossOptions): OF_ACTOR,
    (losses.actor_loss, KLOptions): {"importance_weighted_kl": "importance_weighted"},
    (losses.ppo_loss, PolicyLossOptions): OF_ACTOR,
    (losses.ppo_loss, ValueLossOptions): {
        "value_clip_eps": "clip_eps",
        "value_coef": "coef",
        "half": "half",
    },
    (masking.aggregate, PolicyLossOptions): {"mode": "aggregation"},
    (policy_losses.clipped_policy_loss, PolicyLossOptions): {
        "dual_clip": "dual_clip",
        "log_ratio_clamp": "log_ratio_clamp",
    },
    (off_policy.sampler_weights, PolicyLossOptions): {
        "bound": "sampler_bound",
        "lower_bound": "sampler_lower_bound",
        "level": "sampler_level",
    },
}


@pytest.mark.parametrize(("fn", "options"), SAME, ids=lambda x: x.__name__)
def test_keywords_and_options_have_the_same_defaults(fn, options):
    parameters = inspect.signature(fn).parameters
    defaults = vars(options())
    for keyword, field in SAME[fn, options].items():
        assert parameters[keyword].default == defaults[field], (keyword, field)


def test_methods_start_from_the_options_as_they_are():
    ppo = PPOMethod()
    for name, options in (
        ("kl", KLOptions),
        ("scores", ScoreOptions),
        ("advantages", AdvantageOptions),
        ("policy_loss", PolicyLossOptions),
        ("value_loss", ValueLossOptions),
    ):
        assert getattr(ppo, name) == options()
    grpo = GRPOMethod()
    for name, options in (
        ("scores", ScoreOptions),
        ("groups", GroupOptions),
        ("policy_loss", PolicyLossOptions),
    ):
        assert getattr(grpo, name) == options()


@pytest.mark.parametrize(
    "fn",
    [
        experience.make_experience,
        experience.token_rewards,
        group_experience.make_group_experience,
        objectives.ppo_objective,
        objectives.critic_free_objective,
    ],
)
def test_compositions_take_the_options_as_they_are(fn):
    for name, parameter in inspect.signature(fn).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            assert parameter.default == type(parameter.default)(), name


SURROGATES = {
    "ppo": policy_losses.clipped_policy_loss,
    "gspo": policy_losses.gspo_loss,
    "gmpo": policy_losses.gmpo_loss,
    "cispo": policy_losses.cispo_loss,
    "sapo": policy_losses.sapo_loss,
    "reinforce": policy_losses.reinforce_loss,
}


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_by_name_is_the_function_as_it_is(name):
    """GSPO by name clips at 3e-4, not at PPO's 0.2: seen in its loss."""
    rng = np.random.default_rng(0)
    logprobs, old, advantage = (
        jnp.asarray(x, jnp.float32) for x in rng.normal(-1, 0.3, (3, 4, 5))
    )
    mask = jnp.asarray(np.arange(5) < np.array([[5], [3], [1], [4]]))
    row = Experience(
        mask=mask,
        old_logprobs=old,
        advantages=advantage,
        tokens=jnp.zeros((4, 7), jnp.int32),
        sequence_mask=jnp.ones((4, 7), bool),
    )

    def token_logprobs_fn(params, tokens, mask, /, *, response_length, temperature):
        return logprobs, jnp.zeros_like(logprobs)

    objective = objectives.critic_free_objective(
        token_logprobs_fn,
        policy_loss=PolicyLossOptions(surrogate=name),
    )
    counts = objectives.count_experience(row)
    loss, _ = objective(ActorCritic(actor={}, critic={}), row, counts)
    terms = SURROGATES[name](logprobs, old, advantage, mask)
    np.testing.assert_allclose(loss, jnp.sum(terms) / 13, rtol=1e-6)


def test_an_overlong_penalty_of_one_is_the_functions_own():
    lengths = jnp.array([4, 7, 8])
    ramp = soft_overlong_penalty(lengths, limit=8, buffer=4)
    np.testing.assert_allclose(ramp, [0.0, -0.75, -1.0])
    assert ScoreOptions().overlong_penalty == 1.0


def test_every_option_is_frozen_and_compares_by_value():
    for options in (
        AdvantageOptions,
        GroupOptions,
        KLOptions,
        PolicyLossOptions,
        ScoreOptions,
        ValueLossOptions,
    ):
        assert hash(options()) == hash(options())
        assert jax.tree.structure(options()) == jax.tree.structure(options())
