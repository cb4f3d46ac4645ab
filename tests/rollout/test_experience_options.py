"""`experience.py`: options of advantages, KL and weights, by oracle and invariance."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from rollout.option_cases import (
    AFTER,
    GAMMA,
    LAM,
    LENGTHS,
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

from rlhf_jax.algo.options import (
    AdvantageOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
)
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.rollout import make_experience
from rlhf_jax.rollout.experience import whiten_minibatch
from rlhf_jax.rollout.sampler_mismatch import sampler_gap

# ---- advantages ----


def experience_under(scored=SCORED, scores=ScoreOptions(), **options):
    """With these options of advantages, and the score as the only reward."""
    if options.keys() & {"n_steps", "lam_alpha"}:
        options["lam"] = AdvantageOptions().lam  # which they replace
    options = dataclasses.replace(RAW, **options)
    return make_experience(scored, kl_coef=0.0, scores=scores, advantages=options)[0]


def test_values_with_a_lambda_of_their_own():
    experience = experience_under(value_lam=1.0)
    rewards = rewards_of(X["scores"])
    advantages, _ = gae(rewards, X["values"])
    _, returns = gae(rewards, X["values"], lam=1.0)
    assert_learns(experience, advantages, returns)
    jax.tree.map(
        np.testing.assert_array_equal,
        experience_under(value_lam=LAM),
        experience_under(),
    )


def test_a_lambda_by_length():
    # α = ½: lengths 3, 1, 5, 4 give 1 − 1/1.5, 0, 1 − 1/2.5, 1 − 1/2.
    lam = [1 / 3, 0.0, 0.6, 0.5]
    rewards = rewards_of(X["scores"])
    experience = experience_under(lam_alpha=0.5)
    assert_learns(experience, *gae(rewards, X["values"], lam=lam))
    both = experience_under(lam_alpha=0.5, value_lam=1.0)
    advantages, _ = gae(rewards, X["values"], lam=lam)
    _, returns = gae(rewards, X["values"], lam=1.0)
    assert_learns(both, advantages, returns)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_n_steps(n):
    rewards, returns = rewards_of(X["scores"]), np.zeros((4, T))
    for b, length in enumerate(LENGTHS):
        row = rewards[b, :length], X["values"][b, :length]
        returns[b, :length] = oracles.n_step_row(*row, n, GAMMA)
    assert_learns(experience_under(n_steps=n), returns - X["values"], returns)


def test_what_was_cut_off_could_have_earned_more():
    # γ·V(s_T) = .9 · .625 stands for the score 2.5 on the last token of the third row.
    ended = dataclasses.replace(SCORED, end_values=jnp.float32(X["end_values"]))
    experience = experience_under(ended, bootstrap_truncated=True)
    worth = np.array([0.75, -1.25, 0.5625, 0.375])
    assert_learns(experience, *gae(rewards_of(worth), X["values"]))
    others = [0, 1, 3]
    without = experience_under(ended)
    for name in ("advantages", "returns"):
        np.testing.assert_array_equal(
            getattr(experience, name)[others,], getattr(without, name)[others,]
        )
    with pytest.raises(ValueError, match="bootstrap_truncated=True needs end_values"):
        experience_under(SCORED, bootstrap_truncated=True)
    # Whatever it was scored.
    other = dataclasses.replace(ended, scores=ended.scores.at[2].set(-7.5))
    for name in ("advantages", "returns"):
        np.testing.assert_array_equal(
            getattr(experience_under(other, bootstrap_truncated=True), name),
            getattr(experience, name),
        )


@pytest.mark.parametrize(
    ("scores", "field"),
    [
        (ScoreOptions(missing_eos="mask"), "scores.missing-eos='mask'"),
        (ScoreOptions(missing_eos="subtract"), "scores.missing-eos='subtract'"),
        (ScoreOptions(overlong_buffer=2), "scores.overlong-buffer=2"),
    ],
)
def test_a_fine_for_what_is_bootstrapped_is_refused(scores, field):
    ended = dataclasses.replace(SCORED, end_values=jnp.float32(X["end_values"]))
    with pytest.raises(
        ValueError, match=f"^{field}: applies to the scores of truncated"
    ):
        experience_under(ended, scores, bootstrap_truncated=True)
    method = PPOMethod(
        scores=scores, advantages=AdvantageOptions(bootstrap_truncated=True)
    )
    with pytest.raises(
        ValueError, match=f"^{field}: applies to the scores of truncated"
    ):
        method.validate()


def test_another_critic_for_the_next_state():
    # R_t = r_t + γ·((1 − λ)·V'(s_{t+1}) + λ·R_{t+1}) is the R of V and of a reward
    # that makes up for the difference.
    slow = dataclasses.replace(SCORED, target_values=jnp.float32(X["target_values"]))
    gap = np.where(MASK, X["target_values"] - X["values"], 0.0)
    rewards = rewards_of(X["scores"])
    rewards[:, :-1] += GAMMA * (1 - LAM) * np.where(MASK[:, 1:], gap[:, 1:], 0)
    options = {"slow_critic_decay": 0.9}
    assert_learns(experience_under(slow, **options), *gae(rewards, X["values"]))
    with pytest.raises(
        ValueError, match=r"slow_critic_decay=0\.9: give it together with target_values"
    ):
        experience_under(SCORED, **options)
    # A value of 0 in the end state is 0 to both critics.
    zero = dataclasses.replace(AFTER, end_value="zero")
    got = experience_under(slow, scores=zero, lam=0.0, **options)
    last = LENGTHS[:2] - 1
    close(got.advantages[:2, :][[0, 1], last], -X["values"][[0, 1], last])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_of_the_batch_of_shards_and_of_minibatches(center, ddof):
    raw, returns = gae(rewards_of(X["scores"]), X["values"])

    def whitened(*groups):
        out = np.zeros((4, T))
        for rows in groups:
            here = MASK & np.isin(np.arange(4), rows)[:, None]
            out[here] = oracles.whiten(raw[here], ddof, center=center)
        return out

    options = {"center": center, "ddof": ddof}
    batch = experience_under(whiten="batch", **options)
    assert_learns(batch, whitened([0, 1, 2, 3]), returns)
    shards = experience_under(whiten="shard", whiten_shards=2, **options)
    assert_learns(shards, whitened([0, 1], [2, 3]), returns)
    left_raw = experience_under(whiten="minibatch", **options)
    assert_learns(left_raw, raw, returns)
    minibatch = jax.tree.map(lambda leaf: leaf[jnp.array([1, 2])], left_raw)
    whole = dataclasses.replace(RAW, whiten="minibatch", **options)
    close(whiten_minibatch(minibatch, whole).advantages, whitened([1, 2])[[1, 2]])


# ---- KL ----


def test_the_kl_may_be_in_the_reward_in_the_loss_or_nowhere():
    kinds = {"reward": KLOptions(), "none": KLOptions(place="none")}
    kinds["loss"] = KLOptions(place="loss", estimator="k2")
    made = {
        place: make_experience(SCORED, kl_coef=0.25, kl=kl, advantages=RAW)
        for place, kl in kinds.items()
    }
    log_ratio = X["logprobs"] - X["ref_logprobs"]
    paid = gae(rewards_of(X["scores"], kl=0.25 * log_ratio), X["values"])
    assert_learns(made["reward"][0], *paid)
    for place in ("loss", "none"):
        assert_learns(made[place][0], *gae(rewards_of(X["scores"]), X["values"]))
    np.testing.assert_array_equal(made["loss"][0].kl_coef, np.full(4, 0.25))
    assert made["loss"][0].kl_coef.dtype == jnp.float32
    assert made["reward"][0].kl_coef is None and made["none"][0].kl_coef is None
    for _, metrics in made.values():
        close(metrics["kl/sequence"], np.nansum(log_ratio) / 4)


@pytest.mark.parametrize(
    ("options", "kl_of"),
    [
        ({}, lambda d: d),
        ({"estimator": "k2"}, lambda d: d**2 / 2),
        ({"estimator": "k3"}, lambda d: np.expm1(-d) + d),
        ({"estimator": "abs"}, np.abs),
        ({"log_ratio_clamp": 0.25}, lambda d: np.clip(d, -0.25, 0.25)),
        ({"clamp": 0.25}, lambda d: np.clip(d, -0.25, 0.25)),
        (
            {"estimator": "k3", "log_ratio_clamp": 0.5, "clamp": 0.1},
            lambda d: np.minimum(np.expm1(-d.clip(-0.5, 0.5)) + d.clip(-0.5, 0.5), 0.1),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_kl_costs(options, kl_of):
    experience, _ = make_experience(
        SCORED, kl_coef=0.5, kl=KLOptions(**options), advantages=RAW
    )
    kl = kl_of(X["logprobs"] - X["ref_logprobs"])
    rewards = rewards_of(X["scores"], kl=0.5 * kl)
    assert_learns(experience, *gae(rewards, X["values"]))


def test_without_a_reference():
    alone = dataclasses.replace(SCORED, ref_logprobs=None)
    experience, metrics = make_experience(
        alone, kl_coef=0.5, kl=KLOptions(place="none"), advantages=RAW
    )
    assert_learns(experience, *gae(rewards_of(X["scores"]), X["values"]))
    assert experience.ref_logprobs is None
    assert not {"kl/sequence", "kl/token"} & set(metrics)


# ---- weights ----


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_weights_of_a_sampler_that_rounds(mode, level):
    low, high = (0.9, 1.1) if level == "geometric" else (0.5, 1.25)
    options = PolicyLossOptions(
        sampler_correction=mode,
        sampler_level=level,
        sampler_bound=high,
        sampler_lower_bound=low,
    )
    experience, metrics = make_experience(SCORED, kl_coef=0.0, policy_loss=options)
    log_ratio = X["logprobs"] - X["sampler"]
    if level == "sequence":
        log_ratio[:] = np.nansum(log_ratio, axis=1, keepdims=True)
    if level == "geometric":
        log_ratio[:] = np.nanmean(log_ratio, axis=1, keepdims=True)
    ratio = np.exp(log_ratio)
    assert (ratio[MASK] > high).any() and (ratio[MASK] < low).any()
    bounded = np.clip(ratio, low, high)
    want = bounded if mode == "truncate" else np.where(bounded == ratio, ratio, 0)
    close(experience.weights, np.where(MASK, want, 0))
    beyond = (ratio < low) | (ratio > high)
    close(metrics["sampler/beyond_bounds"], beyond[MASK].mean())
    plain, metrics = make_experience(SCORED, kl_coef=0.0)
    assert plain.weights is None and "sampler/beyond_bounds" not in metrics


def test_how_far_recomputed_log_probabilities_are_from_the_samplers():
    gap = np.abs(X["logprobs"] - X["sampler"])[MASK]
    metrics = sampler_gap(SCORED)
    close(metrics["sampler/log_ratio"], gap.mean())
    close(metrics["sampler/log_ratio_max"], gap.max())


# ---- whatever the options ----

ALL_OPTIONS = {
    "kl": KLOptions(estimator="k3", clamp=0.5),
    "scores": ScoreOptions(
        normalization="running",
        clip=2.0,
        position="after_last_token",
    ),
    "advantages": AdvantageOptions(
        lam_alpha=0.5,
        value_lam=0.9,
        bootstrap_truncated=True,
        slow_critic_decay=0.9,
        ddof=1,
    ),
    "policy_loss": PolicyLossOptions(sampler_correction="truncate"),
    "score_moments": MOMENTS,
}


# What is refused beside bootstrapping.
NOT_BOOTSTRAPPED = {
    "scores": dataclasses.replace(
        ALL_OPTIONS["scores"],
        missing_eos="mask",
        overlong_buffer=3,
        whiten_rewards=True,
    ),
    "advantages": dataclasses.replace(
        ALL_OPTIONS["advantages"], bootstrap_truncated=False
    ),
}


@pytest.fixture(scope="module", params=[{}, NOT_BOOTSTRAPPED], ids=["", "whitened"])
def with_everything(request):
    full = dataclasses.replace(
        SCORED,
        target_values=jnp.float32(X["target_values"]),
        end_values=jnp.float32(X["end_values"]),
    )
    options = ALL_OPTIONS | request.param
    return full, jax.jit(partial(make_experience, kl_coef=0.5, **options))


@pytest.mark.parametrize("garbage", [0.5, np.inf, -1e6])
def test_padding_is_never_read(with_everything, garbage):
    full, fn = with_everything  # where padding holds NaN

    def dirty(array, mask):
        return jnp.where(mask, array, garbage)

    other = dataclasses.replace(
        full,
        rollout=dataclasses.replace(
            full.rollout, logprobs=dirty(full.rollout.logprobs, MASK)
        ),
        logprobs=dirty(full.logprobs, MASK),
        ref_logprobs=dirty(full.ref_logprobs, MASK),
        values=dirty(full.values, STATES),
        target_values=dirty(full.target_values, STATES),
        end_values=dirty(full.end_values, TRUNCATED),
    )
    want = fn(full)
    jax.tree.map(np.testing.assert_array_equal, fn(other), want)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))


def test_the_order_of_the_batch_does_not_matter(with_everything):
    full, fn = with_everything
    order = jnp.array([2, 0, 3, 1])
    turn = partial(jax.tree.map, lambda leaf: leaf[order])
    experience, metrics = fn(full)
    turned, turned_metrics = fn(turn(full))
    jax.tree.map(close, turned, turn(experience))
    jax.tree.map(close, turned_metrics, metrics)
