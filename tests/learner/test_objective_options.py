"""`objectives.py`: every option of the two losses, by loops over tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax.algo.options import KLOptions, PolicyLossOptions, ValueLossOptions
from rlhf_jax.algo.policy_losses import cispo_loss
from rlhf_jax.algo.types import Experience
from rlhf_jax.learner import ActorCritic, count_experience, ppo_objective
from rlhf_jax.learner.gradients import accumulate_gradients

MASK = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
VALUE_MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
ENTROPY = 1.5
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def tabular(params, tokens, mask, /, *, response_length, temperature):
    """A forward pass whose parameters are the log-probabilities and the values."""
    rows = tokens[:, 0]
    entropy = jnp.full(params.actor[rows].shape, ENTROPY)
    return params.actor[rows], entropy, params.critic[rows]


def experience_from(**arrays):
    """Rows are told apart by their first token."""
    rows, width = arrays["mask"].shape
    zeros = jnp.zeros((rows, width))
    names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    fields = dict.fromkeys(names, zeros) | arrays
    return Experience(
        tokens=jnp.arange(rows)[:, None],
        sequence_mask=jnp.ones((rows, 1), bool),
        **{
            name: jnp.asarray(x, None if x.dtype == bool else jnp.float32)
            for name, x in fields.items()
        },
    )


@pytest.fixture(scope="module")
def x():
    """Arrays of 3 rows; new log-probabilities within about 1 nat of the old."""
    rng = np.random.default_rng(3)  # every branch is taken
    names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    x = {name: rng.normal(0, 0.5, MASK.shape) for name in names}
    x["logprobs"] = x["old_logprobs"] + rng.normal(0, 0.6, MASK.shape)
    x["values"] = x["old_values"] + rng.normal(0, 0.5, MASK.shape)
    x["weights"] = rng.uniform(0.5, 1.5, MASK.shape)
    return {name: np.float32(a).astype(np.float64) for name, a in x.items()}


@pytest.fixture(scope="module")
def evaluate(x):
    """`(objective options, experience fields) -> ((loss, metrics), gradients)`."""
    params = ActorCritic(
        actor=jnp.float32(x["logprobs"]), critic=jnp.float32(x["values"])
    )
    frozen = {name: x[name] for name in x if name not in ("logprobs", "values")}
    del frozen["weights"]

    def evaluate(fields=None, **options):
        experience = experience_from(mask=MASK, **frozen | (fields or {}))
        objective = ppo_objective(tabular, **options)
        fn = jax.jit(jax.value_and_grad(objective, has_aux=True))
        return fn(params, experience, count_experience(experience))

    return evaluate


def mean(terms, mask=MASK):
    return terms[mask].mean()


def policy_terms(x, low=0.2, high=0.2):
    return oracles.ppo_terms(
        x["logprobs"], x["old_logprobs"], x["advantages"], low, high
    )


def value_terms(x, eps=0.2):
    return oracles.value_terms(x["values"], x["old_values"], x["returns"], eps)


# ---- the actor ----


def test_the_two_sides_of_the_clip_and_the_entropy_bonus(evaluate, x):
    options = PolicyLossOptions(clip_eps=0.1, clip_eps_high=0.4, entropy_coef=0.5)
    (loss, metrics), _ = evaluate(policy_loss=options)
    want = mean(policy_terms(x, 0.1, 0.4))
    np.testing.assert_allclose(metrics["policy/loss"], want, **TOLERANCE)
    np.testing.assert_allclose(metrics["policy/entropy"], ENTROPY, rtol=1e-6)
    np.testing.assert_allclose(
        loss, want - 0.5 * ENTROPY + mean(value_terms(x)), **TOLERANCE
    )
    assert not np.isclose(want, mean(policy_terms(x, 0.1, 0.1)))


def test_dual_clip_and_the_clamp_of_the_ratio(evaluate, x):
    ratio = np.exp(x["logprobs"] - x["old_logprobs"])
    (_, metrics), _ = evaluate(policy_loss=PolicyLossOptions(dual_clip=1.25))
    bad = x["advantages"] < 0
    acts = MASK & bad & (ratio > 1.25)
    want = np.where(acts, -1.25 * x["advantages"], policy_terms(x))
    assert acts.any()
    np.testing.assert_allclose(metrics["policy/loss"], mean(want), **TOLERANCE)
    options = PolicyLossOptions(clip_eps=0.9, log_ratio_clamp=0.5)
    (_, metrics), grads = evaluate(policy_loss=options)
    far = np.abs(np.log(ratio)) > 0.5
    assert (far & MASK).any()
    bounded = np.clip(np.log(ratio), -0.5, 0.5)
    want = -np.exp(bounded) * x["advantages"]
    np.testing.assert_allclose(metrics["policy/loss"], mean(want), **TOLERANCE)
    np.testing.assert_array_equal(np.asarray(grads.actor)[far], 0)


@pytest.mark.parametrize(
    ("aggregation", "reduce"),
    [
        ("token-mean", mean),
        ("token-sum", lambda x, m=MASK: x[m].sum()),
        ("seq-mean-token-sum", lambda x, m=MASK: x[m].sum() / 3),
        ("seq-mean-token-sum-norm", lambda x, m=MASK: x[m].sum() / 3 / 5),
        (
            "seq-mean-token-mean",
            lambda x, m=MASK: np.mean([row[k].mean() for row, k in zip(x, m)]),  # noqa: B905
        ),
    ],
)
def test_both_losses_are_aggregated_alike(evaluate, x, aggregation, reduce):
    options = PolicyLossOptions(aggregation=aggregation)
    (_, metrics), _ = evaluate({"value_mask": VALUE_MASK}, policy_loss=options)
    policy, value = reduce(policy_terms(x)), reduce(value_terms(x), VALUE_MASK)
    np.testing.assert_allclose(metrics["policy/loss"], policy, **TOLERANCE)
    np.testing.assert_allclose(metrics["value/loss"], value, **TOLERANCE)


def test_another_loss_in_place_of_the_clipped_one(evaluate, x):
    (_, metrics), _ = evaluate(policy_loss_fn=cispo_loss)
    ratio = np.exp(x["logprobs"] - x["old_logprobs"])
    want = -np.minimum(ratio, 5.0) * x["advantages"] * x["logprobs"]
    np.testing.assert_allclose(metrics["policy/loss"], mean(want), **TOLERANCE)


def test_weights_are_for_the_policy_alone(evaluate, x):
    (_, plain), _ = evaluate()
    corrected = PolicyLossOptions(sampler_correction="truncate")
    (_, metrics), _ = evaluate({"weights": x["weights"]}, policy_loss=corrected)
    with pytest.raises(ValueError, match="sampler_correction='truncate'"):
        evaluate(policy_loss=corrected)
    want = mean(x["weights"] * policy_terms(x))
    np.testing.assert_allclose(metrics["policy/loss"], want, **TOLERANCE)
    for name in ("policy/entropy", "policy/approx_kl", "value/loss"):
        np.testing.assert_array_equal(metrics[name], plain[name])


# ---- the KL term ----

BETA = np.array([0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("options", "value_of", "slope_of"),
    [
        ({"estimator": "k2"}, lambda d: d**2 / 2, lambda d: d),
        ({"estimator": "k3"}, lambda d: np.expm1(-d) + d, lambda d: 1 - np.exp(-d)),
        ({"estimator": "k1", "straight_through": True}, lambda d: d, lambda d: d),
        (
            {"estimator": "k3", "straight_through": True},
            lambda d: np.expm1(-d) + d,
            lambda d: d,
        ),
        (
            {"estimator": "k2", "log_ratio_clamp": 0.25},
            lambda d: np.clip(d, -0.25, 0.25) ** 2 / 2,
            lambda d: np.where(np.abs(d) < 0.25, d, 0),
        ),
        (
            {"estimator": "k2", "clamp": 0.125},  # ½·½²
            lambda d: np.minimum(d**2 / 2, 0.125),
            lambda d: np.where(np.abs(d) < 0.5, d, 0),
        ),
    ],
    ids=["k2", "k3", "k1+", "k3+", "clamped ratio", "clamped estimate"],
)
def test_a_kl_term_in_the_loss(evaluate, x, options, value_of, slope_of):
    kl = KLOptions(place="loss", **options)
    (plain, _), plain_grads = evaluate()
    with pytest.raises(ValueError, match=r"kl\.place='reward'"):
        evaluate({"kl_coef": BETA})
    (loss, metrics), grads = evaluate({"kl_coef": BETA}, kl=kl)
    log_ratio, beta = x["logprobs"] - x["ref_logprobs"], BETA[:, None]
    want = mean(beta * value_of(log_ratio))
    np.testing.assert_allclose(metrics["policy/kl_loss"], want, **TOLERANCE)
    np.testing.assert_allclose(loss - plain, want, rtol=1e-4, atol=1e-6)
    slope = np.where(MASK, beta * slope_of(log_ratio), 0) / MASK.sum()
    pulled = np.asarray(grads.actor) - plain_grads.actor
    np.testing.assert_allclose(pulled, slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(grads.critic, plain_grads.critic)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_term_weighted_by_the_ratio(evaluate, x, estimator):
    # ρ · β · k as value; the gradient is ρ · β · ℓ, that of k2, whatever k is.
    kl = KLOptions(place="loss", estimator=estimator, importance_weighted=True)
    (plain, _), plain_grads = evaluate()
    (loss, metrics), grads = evaluate({"kl_coef": BETA}, kl=kl)
    log_ratio = x["logprobs"] - x["ref_logprobs"]
    weight = BETA[:, None] * np.exp(x["logprobs"] - x["old_logprobs"])
    k3 = np.expm1(-log_ratio) + log_ratio
    want = mean(weight * (log_ratio**2 / 2 if estimator == "k2" else k3))
    np.testing.assert_allclose(metrics["policy/kl_loss"], want, **TOLERANCE)
    np.testing.assert_allclose(loss - plain, want, rtol=1e-4, atol=1e-6)
    slope = np.where(MASK, weight * log_ratio, 0) / MASK.sum()
    pulled = np.asarray(grads.actor) - plain_grads.actor
    np.testing.assert_allclose(pulled, slope, rtol=1e-4, atol=1e-6)


# ---- the critic ----


def test_the_value_loss_and_its_weight(evaluate, x):
    (_, plain), grads = evaluate()
    np.testing.assert_allclose(plain["value/loss"], mean(value_terms(x)), **TOLERANCE)
    (_, wide), _ = evaluate(value_loss=ValueLossOptions(clip_eps=0.5))
    np.testing.assert_allclose(
        wide["value/loss"], mean(value_terms(x, 0.5)), **TOLERANCE
    )
    (_, free), _ = evaluate(value_loss=ValueLossOptions(clip_eps=None))
    error = x["values"] - x["returns"]
    np.testing.assert_allclose(free["value/loss"], mean(error**2) / 2, **TOLERANCE)
    assert free["value/clip_fraction"] == 0
    (_, whole), _ = evaluate(value_loss=ValueLossOptions(half=False))
    np.testing.assert_allclose(whole["value/loss"], 2 * plain["value/loss"], rtol=1e-6)
    (loss, weighed), heavy = evaluate(value_loss=ValueLossOptions(coef=0.25))
    np.testing.assert_array_equal(weighed["value/loss"], plain["value/loss"])
    want = weighed["policy/loss"] + 0.25 * plain["value/loss"]
    np.testing.assert_allclose(loss, want, **TOLERANCE)
    np.testing.assert_allclose(heavy.critic, 0.25 * grads.critic, rtol=1e-6)
    np.testing.assert_array_equal(heavy.actor, grads.actor)


def test_the_critics_own_tokens(evaluate, x):
    (_, metrics), grads = evaluate({"value_mask": VALUE_MASK})
    want = mean(value_terms(x), VALUE_MASK)
    np.testing.assert_allclose(metrics["value/loss"], want, **TOLERANCE)
    np.testing.assert_array_equal(np.asarray(grads.critic)[~VALUE_MASK], 0)
    np.testing.assert_array_equal(np.asarray(grads.actor)[~MASK], 0)


# ---- the mean of the means of microbatches ----


@pytest.fixture(scope="module")
def losses_one_to_seven():
    """Policy and value terms 1, 2 | 3, 4, 5, 6, 7, in two rows."""
    terms = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 7]], np.float32)
    experience = experience_from(
        mask=MASK[:2], advantages=-terms, returns=np.sqrt(2 * terms)
    )
    zeros = jnp.zeros((2, 5))
    return ActorCritic(actor=zeros, critic=zeros), experience


@partial(jax.jit, static_argnums=(0, 3))
def accumulated(objective, params, experience, num_microbatches):
    counts = count_experience(experience)
    return accumulate_gradients(
        objective, params, experience, counts, num_microbatches=num_microbatches
    )


@pytest.mark.parametrize(
    ("mean_of_means", "num_microbatches", "loss", "weights"),
    [
        (False, 1, 4.0, [1 / 7, 1 / 7]),
        (False, 2, 4.0, [1 / 7, 1 / 7]),
        (True, 1, 4.0, [1 / 7, 1 / 7]),
        (True, 2, 3.25, [1 / 4, 1 / 10]),  # (1.5 + 5) / 2; 1/(2·2) and 1/(2·5)
    ],
)
def test_only_the_mean_of_means_depends_on_the_microbatches(
    losses_one_to_seven, mean_of_means, num_microbatches, loss, weights
):
    params, experience = losses_one_to_seven
    objective = ppo_objective(
        tabular,
        policy_loss=PolicyLossOptions(mean_of_means=mean_of_means),
        value_loss=ValueLossOptions(clip_eps=None),
        num_microbatches=num_microbatches,
    )
    _, metrics, grads = accumulated(objective, params, experience, num_microbatches)
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["value/loss"], loss, rtol=1e-6)
    share = np.array(weights)[:, None]
    np.testing.assert_allclose(grads.actor, -share * experience.advantages, rtol=1e-5)
    np.testing.assert_allclose(grads.critic, -share * experience.returns, rtol=1e-5)


def test_a_microbatch_without_tokens_still_counts_as_one(losses_one_to_seven):
    params, experience = losses_one_to_seven
    empty = dataclasses.replace(experience, mask=experience.mask.at[0].set(False))
    objective = ppo_objective(
        tabular,
        policy_loss=PolicyLossOptions(mean_of_means=True),
        num_microbatches=2,
    )
    _, metrics, _ = accumulated(objective, params, empty, 2)
    np.testing.assert_allclose(metrics["policy/loss"], (0 + 5) / 2, rtol=1e-6)
