"""`objectives.py`: which parameters each loss reaches, and losses by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from bare_models import bigram_logits

from rlhf_jax.algo.types import Demonstrations, Preferences, Sequences
from rlhf_jax.learner import count_experience, imitation_objective, preference_objective
from rlhf_jax.rollout import token_logprobs_from_logits


@pytest.fixture(scope="module")
def gradients(objective):
    """`(params, experience) -> ActorCritic` of gradients."""

    def gradients(params, experience):
        counts = count_experience(experience)
        return jax.grad(objective, has_aux=True)(params, experience, counts)[0]

    return jax.jit(gradients)


def test_neither_loss_reaches_the_other_network(gradients, params, experience):
    plain = gradients(params, experience)
    for grad in jax.tree.leaves(plain):
        assert np.abs(grad).max() > 1e-3
    other = gradients(
        params, dataclasses.replace(experience, returns=experience.returns + 0.5)
    )
    jax.tree.map(np.testing.assert_array_equal, other.actor, plain.actor)
    assert np.abs(other.critic["score"] - plain.critic["score"]).max() > 1e-3
    other = gradients(
        params, dataclasses.replace(experience, advantages=-experience.advantages)
    )
    jax.tree.map(np.testing.assert_array_equal, other.critic, plain.critic)
    assert np.abs(other.actor["kernel"] - plain.actor["kernel"]).max() > 1e-3


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e6])
def test_padding_is_never_read(gradients, params, experience, garbage):
    names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    dirty = dataclasses.replace(
        experience,
        **{
            name: jnp.where(experience.mask, getattr(experience, name), garbage)
            for name in names
        },
        tokens=jnp.where(experience.sequence_mask, experience.tokens, 9),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        gradients(params, dirty),
        gradients(params, experience),
    )


def test_imitation_is_cross_entropy_of_the_targets_alone():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 6)).astype(np.float32)
    tokens = np.array([[1, 4, 2, 5], [3, 0, 0, 0]], np.int32)
    target = np.array([[0, 0, 1, 1], [1, 1, 0, 0]], bool)
    batch = Demonstrations(
        tokens=jnp.asarray(tokens),
        mask=jnp.array([[True] * 4, [True, True, False, False]]),
        target_mask=jnp.asarray(target),
    )
    objective = imitation_objective(token_logprobs_from_logits(bigram_logits))
    (loss, metrics), grad = jax.value_and_grad(objective, has_aux=True)(
        jnp.asarray(table), batch, jnp.float32(3)
    )
    # Targets: 2 after 4, 5 after 2, 0 after 3. Nothing comes before the first token.
    logprobs = oracles.log_softmax(table)
    want = -(logprobs[4, 2] + logprobs[2, 5] + logprobs[3, 0]) / 3
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    # ∂(−log p_y)/∂z = p − 1_y, in the three rows read and nowhere else.
    want = np.zeros((6, 6))
    for before, token in ((4, 2), (2, 5), (3, 0)):
        want[before] = (np.exp(logprobs[before]) - np.eye(6)[token]) / 3
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-7)


def pairs(*, chosen, rejected):
    """One-token texts."""
    halves = [
        Sequences(tokens=jnp.asarray(x)[:, None], mask=jnp.ones((len(x), 1), bool))
        for x in (chosen, rejected)
    ]
    return Preferences(chosen=halves[0], rejected=halves[1])


def test_preferences_by_hand():
    # The score of a text is the weight of its token.
    weights = jnp.array([0.5, -0.25, 0.125, 1.5])
    score = lambda weights, tokens, mask: weights[tokens[:, 0]]  # noqa: E731
    batch = pairs(chosen=[0, 1, 3, 2], rejected=[2, 3, 3, 1])
    # gaps: .375, -1.75, 0, .375       sums: .625, 1.25, 3, -.125
    softplus = np.log1p(np.exp([-0.375, 1.75, 0.0, -0.375]))

    loss, metrics = preference_objective(score)(weights, batch, jnp.float32(4))
    np.testing.assert_allclose(loss, softplus.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 0.5)  # a tie is no success
    np.testing.assert_allclose(metrics["margin"], -0.25)
    np.testing.assert_allclose(metrics["score_mean"], 4.75 / 8)

    loss, _ = preference_objective(score, label_smoothing=0.25, center_coef=0.2)(
        weights, batch, jnp.float32(4)
    )
    flipped = np.log1p(np.exp([0.375, -1.75, 0.0, 0.375]))
    centre = 0.1 * np.square([0.625, 1.25, 3.0, -0.125])
    want = (0.75 * softplus + 0.25 * flipped + centre).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-6)
