"""Where methods stop, against closed forms: docs/what-is-unbiased.md.

`benchmarks/stationary_points.py` weighs responses by their probability where a batch
would have samples: that is checked against batches of the library in which every
response comes as often as it should.
"""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kl_estimate
from rlhf_jax.algo.losses import actor_loss
from rlhf_jax.algo.options import AdvantageOptions
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.rollout.scoring import mark_stops
from rlhf_jax.tasks import enumerable

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    eg = importlib.import_module("expected_gradients")
    every_response = importlib.import_module("every_response")
    outcomes = importlib.import_module("outcomes")
    points = importlib.import_module("stationary_points")
    tables = importlib.import_module("enumeration")

BETA = eg.BETA
TASKS = [enumerable.random_task(seed) for seed in (0, 1, 2)]


def test_answers_that_go_on_after_a_stop():
    task = TASKS[0]
    language = every_response.language_of(task, PPO_PRESETS["openai_2019"]())
    assert language.tokens.shape == (4**4, 4)
    assert float(language.probs(language.ref_logits).sum()) == pytest.approx(
        1, rel=1e-5
    )
    scored = every_response.scored_rollout(
        language, language.ref_logits, jnp.zeros(language.num_critic_states)
    )
    marked, read = mark_stops(scored.rollout, [task.stop_token])
    np.testing.assert_array_equal(marked.truncated, language.truncated)
    text = np.asarray(language.text)
    np.testing.assert_array_equal(read, task.responses.mask[text])
    np.testing.assert_array_equal(
        np.where(read, language.tokens, -1),
        np.where(read, task.responses.tokens[text], -1),
    )
    # The reference of the parts before a stop is the task's.
    probs = np.bincount(text, np.asarray(language.probs(language.ref_logits)))
    want = np.exp(enumerable.response_logprobs(task, task.ref_logits))
    np.testing.assert_allclose(probs, want, rtol=1e-5)


REDUCED = {
    "rewards whitened": outcomes.CHANGES["token rewards whitened"],
    "not centred": PPOMethod(advantages=AdvantageOptions(lam=0.9, center=False)),
    "per answer": outcomes.CHANGES["each response divided by its length"],
    "masked": outcomes.CHANGES["responses without a stop masked"],
    "in the loss": outcomes.CHANGES["k2 in the loss, whitened"],
    "trl": PPO_PRESETS["nplus_tldr"](),
}


@pytest.mark.parametrize("name", REDUCED)
def test_weights_are_a_batch_in_which_rows_come_as_often_as_they_should(name):
    # A uniform policy over two tokens: an answer of n tokens has probability 2⁻ⁿ, so
    # that eight rows are the batch without end, and all of it is the library's.
    method = REDUCED[name]
    task = enumerable.random_task(0, vocabulary_size=2, max_steps=3)
    language = every_response.language_of(task, method)
    logits = jnp.zeros_like(language.ref_logits)
    critic = jnp.asarray(
        np.random.default_rng(0).standard_normal(language.num_critic_states),
        jnp.float32,
    )
    rows = np.repeat(np.arange(4), 2 ** (3 - task.responses.lengths))
    assert len(rows) == 8
    scored = jax.tree.map(
        lambda x: x[rows], every_response.scored_rollout(language, logits, critic)
    )
    experience, _ = eg.experience_of(
        scored,
        kl_coef=BETA,
        kl=method.kl,
        scores=method.scores,
        advantages=method.advantages,
    )

    @jax.jit
    @jax.grad
    def gradient(logits):
        logprobs = language.logprobs(logits)[rows]
        return actor_loss(
            logprobs,
            experience,
            aggregation=method.policy_loss.aggregation,
            kl_fn=functools.partial(kl_estimate, estimator=method.kl.estimator),
            # Where rows are left out, the others keep their weight.
            num_sequences=8 if method.scores.missing_eos == "mask" else None,
        )[0]

    want = -gradient(logits)
    prepared = dataclasses.replace(
        language, scores=points.method_scores(language, method)
    )
    expected_step = jax.jit(points.expected_step, static_argnames="method")
    got, _ = expected_step(
        prepared, logits, critic, method=points.essentials(method), beta=BETA
    )
    deviation = 1.0
    if method.advantages.whiten == "batch":
        raw, _ = eg.experience_of(
            scored,
            kl_coef=BETA,
            kl=method.kl,
            scores=method.scores,
            advantages=dataclasses.replace(
                method.advantages, whiten="none", center=True
            ),
        )
        deviation = np.std(np.asarray(raw.advantages)[np.asarray(raw.mask)])
    np.testing.assert_allclose(got, deviation * want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "λ = 0", "trl"])
def test_the_critic_is_exact(name):
    # Whatever λ is, and with a state after the last token that is worth the score.
    method = PPO_PRESETS["trl"]() if name == "trl" else outcomes.CHANGES[name]
    case = eg.Case(0)
    language = every_response.language_of(case.task, method)
    fixed_point = jax.jit(points.fixed_point_critic, static_argnames="method")
    critic = fixed_point(
        language,
        jnp.array(case.logits),
        jnp.zeros(language.num_critic_states),
        method=points.essentials(method),
        beta=BETA,
    )
    prefixes, ends = np.split(np.asarray(critic), [len(case.values)])
    np.testing.assert_allclose(prefixes, case.values, rtol=1e-5, atol=1e-6)
    if name == "trl":
        short = case.responses.lengths < case.task.max_steps
        np.testing.assert_allclose(ends[short], case.task.scores[short], rtol=1e-5)


def found(method, **options):
    return [outcomes.outcome(task, method, beta=BETA, **options) for task in TASKS]


WITH_KL = {"default": PPOMethod(), "subtract": outcomes.FINED} | {
    name: make() for name, make in PPO_PRESETS.items() if name != "verl"
}


@pytest.mark.parametrize("name", WITH_KL)
def test_presets_with_a_kl_stop_at_the_optimum_of_what_they_climb(name):
    for result in found(WITH_KL[name]):
        assert result.steps < 100
        assert result.own_share > 0.99999
        assert result.own_distance < 1e-5
        # That is the scores' own optimum where no answer is scored otherwise.
        if name in ("default", "trl", "openrlhf", "deepspeed_chat"):
            assert result.distance < 1e-5
        else:
            assert result.share < 0.9 and result.distance > 0.3


def test_verl_stops_at_the_single_best_answer():
    for task, result in zip(TASKS, found(PPO_PRESETS["verl"]()), strict=True):
        assert result.answers == pytest.approx(1, abs=1e-3)
        assert result.score == pytest.approx(task.scores.max(), rel=1e-4)


def test_an_end_that_is_not_trained_takes_part_of_the_score():
    method = PPO_PRESETS["deepspeed_chat"]()
    for task in TASKS:
        ends = np.random.default_rng(0).standard_normal(len(task.scores))
        result = outcomes.outcome(task, method, beta=BETA, end_values=ends)
        assert result.own_distance < 1e-5 < 0.005 < result.distance


@functools.cache
def changed(name):
    method = outcomes.CHANGES[name]
    return [outcomes.changed_outcome(task, method, beta=BETA) for task in TASKS]


@pytest.mark.parametrize(
    "name", ["λ = 0", "length-adaptive λ, α = 1", "each response divided by its length"]
)
def test_at_the_optimum_no_weighting_of_advantages_matters(name):
    # There every answer returns the same, and every TD error is 0.
    assert min(result.share for result in changed(name)) > 0.99999


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("γ = 0.9", 0.95, 0.985),
        ("token rewards whitened", 0.995, 0.9999),
        ("k2 in the reward", 0.6, 0.67),
        ("k3 in the reward, clamps 20 and 10", 0.57, 0.63),
        ("k2 in the loss, not whitened", 0.85, 0.9),
        ("k3 in the loss, not whitened", 0.82, 0.87),
        ("k3 in the loss, whitened", 0.82, 0.86),
    ],
)
def test_what_moves_the_stationary_point(name, low, high):
    assert low < np.mean([result.share for result in changed(name)]) < high
    assert max(result.steps for result in changed(name)) < 2000


def test_k3_in_the_reward_runs_away():
    for result in changed("k3 in the reward"):
        assert np.isnan(result.score)


def test_whitened_advantages_need_a_larger_beta_beside_a_kl_in_the_loss():
    # The sharper the policy, the smaller σ, the less β · σ holds it.
    name = "k2 in the loss, whitened"
    for result in changed(name):
        assert result.answers == pytest.approx(1, abs=1e-3)
    for task in TASKS:
        at_beta = functools.partial(
            outcomes.changed_outcome, task, outcomes.CHANGES[name]
        )
        assert at_beta(beta=0.8).answers == pytest.approx(1, abs=1e-3)
        assert 20 < at_beta(beta=1.0).answers < 45


def test_masking_truncated_answers_orders_the_others_and_forgets_how_many():
    method = outcomes.CHANGES["responses without a stop masked"]
    for task in TASKS:
        stopped = ~task.responses.truncated
        point = points.stationary_point(task, method, beta=BETA, rate=0.5)
        best = np.exp(enumerable.optimal_response_logprobs(task, kl_coef=BETA))
        got, want = point.probs[stopped], best[stopped]
        np.testing.assert_allclose(got / got.sum(), want / want.sum(), atol=1e-5)
        assert abs(got.sum() - want.sum()) > 0.1
    # More are cut off than of the reference's, and nothing holds that.
    cut = [x.truncated for x in changed("responses without a stop masked")]
    assert np.mean(cut) > 0.5


def test_the_tables_have_a_row_for_every_preset():
    names = [row[0] for row in tables.preset_rows()]
    assert set(PPO_PRESETS) <= set(names)
    assert tables.percent(1e-6) == "0" and tables.percent(0.0419) == "4.2 %"
