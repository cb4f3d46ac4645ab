"""What `grpo` does where nothing is said, and the scales it refuses beside a KL."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.options import GroupOptions, KLOptions
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.config.grpo import GRPOMethod
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.learner import critic_free_objective
from rlhf_jax.rollout import make_group_experience

B, T = 8, 5


def scored(scores):
    rng = np.random.default_rng(0)
    logprobs = jnp.asarray(rng.normal(-1, 0.3, (B, T)), jnp.float32)
    return ScoredRollout(
        rollout=Rollout(
            prompts=Prompts(
                tokens=jnp.ones((B, 1), jnp.int32), lengths=jnp.ones(B, jnp.int32)
            ),
            responses=jnp.ones((B, T), jnp.int32),
            lengths=jnp.full(B, T, jnp.int32),
            truncated=jnp.ones(B, bool),
            logprobs=logprobs,
        ),
        logprobs=logprobs,
        ref_logprobs=logprobs + jnp.asarray(rng.normal(0, 0.05, (B, T)), jnp.float32),
        values=None,
        scores=jnp.asarray(scores, jnp.float32),
    )


def advantages(scores, method):
    experience, _ = make_group_experience(
        scored(scores),
        group_size=4,
        kl_coef=method.kl.coef,
        kl=method.kl,
        groups=method.groups,
    )
    return np.asarray(experience.advantages)


def test_equal_scores_leave_the_kl_and_nothing_else():
    """−β · (KL of a response − the mean of the others'), not scaled up."""
    method = GRPOMethod()
    x = scored(np.zeros(B))
    kl = np.asarray(x.logprobs - x.ref_logprobs, np.float64).sum(axis=1).reshape(2, 4)
    others = (kl.sum(axis=1, keepdims=True) - kl) / 3
    want = -method.kl.coef * (kl - others).reshape(B, 1)
    np.testing.assert_allclose(
        advantages(np.zeros(B), method), np.broadcast_to(want, (B, T)), rtol=1e-4
    )


def test_scores_are_compared_with_the_others_and_divided_by_nothing():
    scores = np.array([1.0, 0, 0, 0, 2, 2, 0, 0])
    method = GRPOMethod(kl=KLOptions(place="none"))
    want = np.array([1.0, -1 / 3, -1 / 3, -1 / 3, 4 / 3, 4 / 3, -4 / 3, -4 / 3])
    np.testing.assert_allclose(advantages(scores, method)[:, 0], want, rtol=1e-6)


@pytest.mark.parametrize("scale", ["std", "batch-std", "signal"])
def test_a_scale_of_scores_beside_a_kl_in_the_reward_is_refused(scale):
    groups = GroupOptions(baseline="mean", scale=scale)
    with pytest.raises(
        ValueError, match=rf"^groups\.scale='{scale}': cannot be combined"
    ):
        GRPOMethod(groups=groups).validate()
    GRPOMethod(groups=groups, kl=KLOptions(place="none")).validate()


def test_every_preset_and_the_default_are_allowed():
    for make in (GRPOMethod, *GRPO_PRESETS.values()):
        make().validate()
    GRPOMethod(resample=2).validate()  # the filter looks at raw scores


def test_objectives_check_their_options():
    def token_logprobs_fn(*_, **__):
        raise AssertionError("called")

    for kl, message in (
        (KLOptions(place="loss", estimator="k1"), r"kl\.estimator='k1'"),
        (KLOptions(coef=float("nan")), r"kl\.coef=nan: must be finite"),
        (KLOptions(place="none", coef=float("inf")), r"kl\.coef=inf"),
    ):
        with pytest.raises(ValueError, match=message):
            critic_free_objective(token_logprobs_fn, kl=kl)
