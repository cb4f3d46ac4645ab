"""An answer that is cut off, bootstrapped: paid once, whatever else is asked for."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algo.options import (
    AdvantageOptions,
    KLOptions,
    ScoreOptions,
    check_bootstrap,
)
from rlhf_jax.algo.scores import ScoreMoments
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.learner import ActorCritic, init_train_state, make_update, ppo_objective
from rlhf_jax.rollout import make_experience

SCORE, T = 0.25, 6
LENGTHS = np.array([T, 4, T, 1])  # the first and the third may be cut off
MASK = np.arange(T) < LENGTHS[:, None]


def scored_by_an_exact_critic(truncated, values=SCORE, scores=SCORE):
    """Every answer earns 0.25 in the end, and the critic knows it in every state."""
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    logprobs = jnp.full((4, T), -1.0)
    return ScoredRollout(
        rollout=Rollout(
            prompts=Prompts(
                tokens=jnp.ones((4, 2), jnp.int32), lengths=jnp.full(4, 2, jnp.int32)
            ),
            responses=jnp.ones((4, T), jnp.int32),
            lengths=lengths,
            truncated=jnp.asarray(truncated),
            logprobs=logprobs,
        ),
        logprobs=logprobs,
        ref_logprobs=logprobs,
        values=jnp.full((4, T), values),
        scores=jnp.full(4, scores),
        end_values=jnp.full(4, values),
    )


def allowed():
    """Every combination of rules for scores and advantages that is not refused."""
    rules = itertools.product(
        ("keep", "subtract", "replace", "scale", "mask"),
        (1.0, -1.0, 0.5, 0.0),
        (None, 3),
        ("last_token", "after_last_token"),
        ("learned", "kept", "zero"),
        (0.0, 0.95, 1.0),
        (None, 0.5),
    )
    for eos, penalty, buffer, position, end, lam, value_lam in rules:
        scores = ScoreOptions(
            missing_eos=eos,
            missing_eos_penalty=penalty,
            overlong_buffer=buffer,
            position=position,
            end_value=end,
        )
        advantages = AdvantageOptions(
            bootstrap_truncated=True, lam=lam, value_lam=value_lam, whiten="none"
        )
        try:
            scores.validate("scores")
            check_bootstrap(advantages, scores)
        except ValueError:
            continue
        yield scores, advantages


def test_with_an_exact_critic_truncation_leaves_the_return_unchanged():
    cases = list(allowed())
    assert {scores.position for scores, _ in cases} == {
        "last_token",
        "after_last_token",
    }
    for scores, advantages in cases:
        if scores.end_value == "zero":  # an exact critic knows of the end, too
            continue
        make = partial(
            make_experience, kl_coef=0.1, scores=scores, advantages=advantages
        )
        finished, _ = make(scored_by_an_exact_critic(np.zeros(4, bool)))
        cut, _ = make(scored_by_an_exact_critic(np.array([True, False, True, False])))
        np.testing.assert_allclose(np.asarray(cut.returns)[MASK], SCORE, rtol=1e-6)
        np.testing.assert_allclose(cut.returns, finished.returns, rtol=1e-6)
        np.testing.assert_allclose(cut.advantages, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "scores"),
    [
        ("missing-eos", {"missing_eos": "subtract"}),
        ("missing-eos", {"missing_eos": "replace", "missing_eos_penalty": -1.0}),
        ("missing-eos", {"missing_eos": "scale", "missing_eos_penalty": 0.5}),
        ("missing-eos", {"missing_eos": "mask"}),
        ("overlong-buffer", {"overlong_buffer": 2}),
        ("whiten-rewards", {"whiten_rewards": True}),
    ],
)
def test_what_would_count_twice_is_refused(field, scores):
    advantages = AdvantageOptions(bootstrap_truncated=True)
    wanted = rf"^scores\.{field}=.*advantages\.bootstrap-truncated.*leave it at"
    with pytest.raises(ValueError, match=wanted):
        PPOMethod(advantages=advantages, scores=ScoreOptions(**scores)).validate()
    scored = scored_by_an_exact_critic(np.ones(4, bool))
    with pytest.raises(ValueError, match=wanted):
        make_experience(
            scored, kl_coef=0.0, advantages=advantages, scores=ScoreOptions(**scores)
        )
    PPOMethod(advantages=advantages).validate()  # as things are by default


def test_the_kl_is_still_paid_and_the_score_never():
    """By hand: γ = λ = 1, β = 0.5 and a log-ratio of 0.2 at each of six tokens."""
    scored = scored_by_an_exact_critic(np.array([True, False, False, False]))
    scored = dataclasses.replace(
        scored,
        ref_logprobs=scored.logprobs - 0.2,
        scores=jnp.array([1e6, SCORE, SCORE, SCORE]),  # of a cut text: never read
    )
    options = AdvantageOptions(bootstrap_truncated=True, lam=1.0, whiten="none")
    experience, _ = make_experience(scored, kl_coef=0.5, advantages=options)
    left = np.arange(T, 0, -1)
    np.testing.assert_allclose(experience.returns[0], SCORE - 0.1 * left, rtol=1e-5)


def test_normalised_scores_are_not_paid_either():
    moments = ScoreMoments(
        count=jnp.float32(4), mean=jnp.float32(1.0), squares=jnp.float32(16.0)
    )  # (0.25 − 1) / 2 for those that finished, V for those that did not
    scored = scored_by_an_exact_critic(np.array([True, False, True, False]))
    experience, _ = make_experience(
        scored,
        kl_coef=0.0,
        scores=ScoreOptions(normalization="running"),
        advantages=AdvantageOptions(bootstrap_truncated=True, lam=1.0, whiten="none"),
        score_moments=moments,
    )
    np.testing.assert_allclose(
        experience.returns[:, 0], [SCORE, -0.375, SCORE, -0.375], rtol=1e-5
    )


def test_a_constant_reward_stays_at_its_value():
    """The critic follows its own targets: twice the score, and it would run away.

    One answer in twenty reaches its stop token, all scores are 0.25, and the actor
    stands still.
    """
    batch, updates = 64, 100
    prompts = Prompts(
        tokens=jnp.ones((batch, 1), jnp.int32), lengths=jnp.ones(batch, jnp.int32)
    )

    def forward(params, tokens, mask, /, *, response_length, temperature):
        shape = (tokens.shape[0], response_length)
        flat = jnp.zeros(shape) + 0.0 * params.actor["logit"]
        values = jnp.broadcast_to(params.critic["value"][:response_length], shape)
        return flat, flat, values

    optimizers = ActorCritic(actor=optax.sgd(0.0), critic=optax.adam(0.03))
    update = make_update(
        ppo_objective(forward), optimizers, num_epochs=4, num_minibatches=1
    )
    state = init_train_state(
        jax.random.key(0),
        ActorCritic(
            actor={"logit": jnp.zeros(())}, critic={"value": jnp.full(T + 1, 0.15)}
        ),
        optimizers,
        kl_coef=0.0,
    )

    @jax.jit
    def experience_of(state, truncated):
        values = jnp.broadcast_to(state.params.critic["value"], (batch, T + 1))
        scored = ScoredRollout(
            rollout=Rollout(
                prompts=prompts,
                responses=jnp.ones((batch, T), jnp.int32),
                lengths=jnp.full(batch, T, jnp.int32),
                truncated=truncated,
                logprobs=jnp.zeros((batch, T)),
            ),
            logprobs=jnp.zeros((batch, T)),
            ref_logprobs=None,
            values=values[:, :T],
            scores=jnp.full(batch, SCORE),
            end_values=values[:, T - 1],
        )
        return make_experience(
            scored,
            kl_coef=0.0,
            kl=KLOptions(place="none"),
            advantages=AdvantageOptions(bootstrap_truncated=True),
        )

    rng = np.random.default_rng(0)
    means = []
    for _ in range(updates):
        truncated = jnp.asarray(rng.random(batch) > 0.05)
        experience, metrics = experience_of(state, truncated)
        state, _ = update(state, experience)
        means.append(float(metrics["value/mean"]))
    assert means[0] == pytest.approx(0.15, abs=1e-5)
    assert max(means) < 0.35
    assert means[-1] == pytest.approx(SCORE, abs=0.02)
