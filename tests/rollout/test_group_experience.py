"""`group_experience.py`: every baseline and scale, by hand and by float64 loops."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax.algo.options import (
    GroupOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
)
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.rollout import make_experience, make_group_experience
from rlhf_jax.rollout.group_experience import token_advantages

G, B, T = 3, 9, 4
LENGTHS = np.array([4, 1, 3, 2, 4, 1, 3, 3, 2])
TRUNCATED = np.arange(B) == 4  # the first row stopped at the limit
MASK = np.arange(T) < LENGTHS[:, None]
SCORES = np.array([0.5, -1.25, 2.0, 0.75, 3.5, 0.25, 1.5, 1.5, 1.5])  # no signal in ⅓
GREEDY = np.repeat([0.25, -2.0, 1.0], G)
BETA = 0.3
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
close = partial(np.testing.assert_allclose, **TOLERANCE)

IN_REWARD, NO_KL = KLOptions(), KLOptions(place="none")
IN_LOSS = KLOptions(place="loss", estimator="k2")
SCALES = {
    "mean": ("std", "batch-std", "tokens", "signal", "none"),
    "leave-one-out": ("std", "batch-std", "tokens", "none"),
    "length-weighted": ("tokens", "none"),
    "best-of-others": ("std", "none"),
}
COMPARED = [(baseline, scale) for baseline in SCALES for scale in SCALES[baseline]]
BY_THEMSELVES = [(x, scale) for x in ("greedy", "none") for scale in ("tokens", "none")]


def padded(rng):
    """Log-probabilities with NaN where nothing may read them."""
    return np.where(MASK, np.float32(rng.normal(-2, 0.5, (B, T))), np.nan)


def rollout_of(lengths, truncated, logprobs):
    rows, width = logprobs.shape
    return Rollout(
        prompts=Prompts(
            tokens=jnp.ones((rows, 2), jnp.int32),
            lengths=jnp.full(rows, 2, jnp.int32),
        ),
        responses=jnp.ones((rows, width), jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        truncated=jnp.asarray(truncated),
        logprobs=jnp.asarray(logprobs, jnp.float32),
    )


RNG = np.random.default_rng(0)
SAMPLER, LOGPROBS, REF = padded(RNG), padded(RNG), padded(RNG)
SCORED = ScoredRollout(
    rollout=rollout_of(LENGTHS, TRUNCATED, SAMPLER),
    logprobs=jnp.asarray(LOGPROBS, jnp.float32),
    ref_logprobs=jnp.asarray(REF, jnp.float32),
    values=None,
    scores=jnp.asarray(SCORES, jnp.float32),
)
# Of other lengths than the answers that were sampled; the second was cut off.
GREEDY_ANSWERS = (
    rollout_of(np.repeat([2, 4, 1], G), np.repeat([False, True, False], G), SAMPLER),
    jnp.asarray(GREEDY, jnp.float32),
)
GREEDY_OPTIONS = GroupOptions(baseline="greedy", scale="none")
group_experience = partial(make_group_experience, group_size=G, kl_coef=BETA)


# ---- the oracle ----


def rewards_of(scores, beta):
    """β · (log π_ref − log π) at each token, and the score at the last."""
    rewards = np.where(MASK, beta * (REF - LOGPROBS), 0.0)
    rewards[range(B), LENGTHS - 1] += scores
    return rewards


def baseline_of(name, worth, lengths, i):
    """What answer i of a group is compared with."""
    others = np.delete(worth, i)
    return {
        "mean": worth.mean(),
        "leave-one-out": others.mean(),
        "length-weighted": (lengths * worth).sum() / lengths.sum(),
        # The best of the group is a tie, or it is this answer or one of the others.
        "best-of-others": min(worth[i], others.max()),
    }[name]


def compared(rewards, name, scale, ddof):
    """`[B, T]`, answer by answer."""
    worth, out = rewards.sum(axis=1), np.zeros((B, T))
    groups = [range(first, first + G) for first in range(0, B, G)]
    with_signal = [g for g in groups if np.ptp(worth[list(g)]) > 0]
    for group in groups:
        own = worth[list(group)]
        divisor = {
            "std": own.std(ddof=ddof) + 1e-4,
            "batch-std": worth.std(ddof=ddof) + 1e-4,
            "signal": len(with_signal) / len(groups),
        }.get(scale, 1.0)
        for i, row in enumerate(group):
            gain = own[i] - baseline_of(name, own, LENGTHS[list(group)], i)
            out[row, : LENGTHS[row]] = gain / divisor
    return out


def by_themselves(rewards, name, gamma):
    """`[B, T]`, token by token: what it and those after it earned."""
    out = np.zeros((B, T))
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            later = range(t, length)
            out[row, t] = sum(gamma ** (k - t) * rewards[row, k] for k in later)
            out[row, t] -= GREEDY[row] if name == "greedy" else 0.0
    return out


def whitened(advantages, scale, ddof):
    if scale == "tokens":
        advantages[MASK] = oracles.whiten(advantages[MASK], ddof=ddof)
    return advantages


# ---- advantages ----


@pytest.mark.parametrize(
    ("baseline", "scale", "want"),
    [  # scores 1, 3 | 2, 2 of 1, 3 | 2, 2 tokens
        ("mean", "none", [-1, 1, 0, 0]),
        ("mean", "std", [-(0.5**0.5), 0.5**0.5, 0, 0]),
        ("mean", "batch-std", [-(1.5**0.5), 1.5**0.5, 0, 0]),  # σ² = 2 / 3
        ("mean", "signal", [-2, 2, 0, 0]),  # one group of two has a signal
        ("leave-one-out", "none", [-2, 2, 0, 0]),
        ("leave-one-out", "std", [-(2**0.5), 2**0.5, 0, 0]),
        ("leave-one-out", "batch-std", [-(6**0.5), 6**0.5, 0, 0]),
        ("length-weighted", "none", [-1.5, 0.5, 0, 0]),  # (1 · 1 + 3 · 3) / 4 = 2.5
        ("best-of-others", "none", [0, 2, 0, 0]),
        ("best-of-others", "std", [0, 2**0.5, 0, 0]),
        # Over 8 tokens, mean (−1 + 3) / 8 = ¼ and σ² = (1 + 3 − 8 / 16) / 7 = ½.
        ("mean", "tokens", np.sqrt(2) * np.array([-1.25, 0.75, -0.25, -0.25])),
        ("none", "none", [1, 3, 2, 2]),
        ("greedy", "none", [0.5, 2.5, 0, 0]),
    ],
)
def test_by_hand(baseline, scale, want):
    lengths = np.array([1, 3, 2, 2])
    mask = np.arange(3) < lengths[:, None]
    rewards = np.where(mask, 0.0, np.nan)
    rewards[range(4), lengths - 1] = [1, 3, 2, 2]
    greedy = jnp.array([0.5, 0.5, 2, 2]) if baseline == "greedy" else None
    got = token_advantages(
        jnp.asarray(rewards, jnp.float32),
        jnp.asarray(mask),
        2,
        GroupOptions(baseline=baseline, scale=scale),
        greedy_scores=greedy,
    )
    close(got, np.where(mask, np.array(want)[:, None], 0.0), rtol=1e-3)


@pytest.mark.parametrize("kl", [NO_KL, IN_REWARD], ids=["no KL", "KL in the reward"])
@pytest.mark.parametrize(("baseline", "scale"), COMPARED)
def test_answers_against_each_other(baseline, scale, kl):
    for ddof in (0, 1) if scale not in ("signal", "none") else (1,):
        groups = GroupOptions(baseline=baseline, scale=scale, ddof=ddof)
        experience, _ = group_experience(SCORED, kl=kl, groups=groups)
        rewards = rewards_of(SCORES, BETA if kl == IN_REWARD else 0.0)
        want = whitened(compared(rewards, baseline, scale, ddof), scale, ddof)
        close(experience.advantages, want)
        np.testing.assert_array_equal(experience.mask, MASK)
        assert experience.old_values is None and experience.returns is None


@pytest.mark.parametrize(("baseline", "scale"), BY_THEMSELVES)
def test_rewards_to_go_less_the_greedy_answers_score(baseline, scale):
    for gamma, ddof in ((1.0, 1), (0.9, 0 if scale == "tokens" else 1)):
        groups = GroupOptions(baseline=baseline, scale=scale, gamma=gamma, ddof=ddof)
        experience, metrics = make_group_experience(
            SCORED,
            group_size=1,
            kl_coef=BETA,
            kl=IN_REWARD,
            groups=groups,
            greedy=GREEDY_ANSWERS if baseline == "greedy" else None,
        )
        want = by_themselves(rewards_of(SCORES, BETA), baseline, gamma)
        close(experience.advantages, whitened(want, scale, ddof))
        assert "group/score_std" not in metrics


def test_the_greedy_answers_are_penalised_alike():
    options = ScoreOptions(
        missing_eos="subtract", missing_eos_penalty=0.5, overlong_buffer=2
    )
    experience, _ = group_experience(
        SCORED,
        kl=NO_KL,
        scores=options,
        groups=GREEDY_OPTIONS,
        greedy=GREEDY_ANSWERS,
    )
    # Of 4 columns the last 2 are the ramp. Greedy answers of 2, 4, 1 tokens score ¼,
    # −2 − ½ − 1, 1; sampled ones of 4, 1, 3, 2, 4, 1, … tokens lose 1, 0, ½, 0, 1½, 0.
    want = [-0.75, -1.5, 1.25, 4.25, 5.5, 3.75, 0.0, 0.0, 0.5]
    close(experience.advantages[:, 0], want)
    close(experience.advantages, np.where(MASK, np.array(want)[:, None], 0.0))


# ---- scores ----


def test_the_ramp_of_long_answers_is_compared():
    options = ScoreOptions(overlong_buffer=2, overlong_penalty=3.0)
    groups = GroupOptions(baseline="mean")
    experience, metrics = group_experience(
        SCORED, kl=NO_KL, scores=options, groups=groups
    )
    # Of 4, 1, 3 | 2, 4, 1 | 3, 3, 2 tokens: 3, 0, 1½ | 0, 3, 0 | 1½, 1½, 0 less.
    # −2½, −1¼, ½ | ¾, ½, ¼ | 0, 0, 1½; means −13/12, ½, ½.
    want = np.array([-17 / 12, -1 / 6, 19 / 12, 0.25, 0, -0.25, -0.5, -0.5, 1])
    close(experience.advantages, np.where(MASK, want[:, None], 0.0))
    close(metrics["reward/score_mean"], SCORES.mean())  # as it was given
    close(metrics["reward/shaped_mean"], SCORES.mean() - 10.5 / 9)


def test_an_answer_that_is_left_out_counts_in_its_group():
    kept, _ = group_experience(SCORED, kl=NO_KL)
    experience, _ = group_experience(
        SCORED, kl=NO_KL, scores=ScoreOptions(missing_eos="mask")
    )
    used = MASK & ~TRUNCATED[:, None]
    np.testing.assert_array_equal(experience.mask, used)
    np.testing.assert_array_equal(
        experience.advantages, np.where(used, kept.advantages, 0.0)
    )
    # Group ¾, 3½, ¼ of mean 3/2: without the second, ¾ would be above the mean.
    assert np.all(experience.advantages[3, :2] < 0)
    for name in ("old_logprobs", "ref_logprobs"):
        np.testing.assert_array_equal(getattr(experience, name)[4], 0)
    np.testing.assert_array_equal(experience.sequence_mask[4], [True] * 6)
    # A scale over tokens is over those that are trained on.
    experience, _ = group_experience(
        SCORED,
        kl=NO_KL,
        scores=ScoreOptions(missing_eos="mask"),
        groups=GroupOptions(baseline="mean", scale="tokens"),
    )
    want = np.zeros((B, T))
    centred = compared(rewards_of(SCORES, 0.0), "mean", "none", 1)
    want[used] = oracles.whiten(centred[used], ddof=1)
    close(experience.advantages, want)


def test_scores_are_clipped_before_they_are_compared():
    experience, metrics = group_experience(
        SCORED,
        kl=NO_KL,
        scores=ScoreOptions(clip=1.0),
        groups=GroupOptions(baseline="best-of-others", scale="none"),
    )
    # ½, −1, 1 | ¾, 1, ¼ | 1, 1, 1
    close(experience.advantages[:, 0], [0, 0, 0.5, 0, 0.25, 0, 0, 0, 0])
    inside = [np.std(SCORES[i : i + G]) for i in range(0, B, G)]
    close(metrics["group/score_std"], np.mean(inside))  # of the raw ones


# ---- the KL ----


def test_the_kl_in_the_loss_leaves_advantages_alone():
    plain, plain_metrics = group_experience(SCORED, kl=NO_KL)
    in_loss, metrics = group_experience(SCORED, kl=IN_LOSS)
    np.testing.assert_array_equal(in_loss.advantages, plain.advantages)
    np.testing.assert_array_equal(in_loss.kl_coef, np.full(B, np.float32(BETA)))
    close(in_loss.ref_logprobs, np.where(MASK, REF, 0.0))
    close(in_loss.old_logprobs, np.where(MASK, LOGPROBS, 0.0))
    assert plain.kl_coef is None
    kl = np.where(MASK, LOGPROBS - REF, 0.0)
    close(metrics["kl/sequence"], kl.sum() / B)
    close(metrics["kl/token"], kl.sum() / MASK.sum())
    close(metrics["kl/coef"], BETA)
    assert "kl/coef" not in plain_metrics
    in_reward, metrics = group_experience(SCORED, kl=IN_REWARD)
    assert in_reward.kl_coef is None
    close(metrics["reward/shaped_mean"], SCORES.mean() - BETA * kl.sum() / B)


def test_without_a_reference():
    alone = dataclasses.replace(SCORED, ref_logprobs=None)
    experience, metrics = group_experience(alone, kl=NO_KL)
    with_one, _ = group_experience(SCORED, kl=NO_KL)
    np.testing.assert_array_equal(experience.advantages, with_one.advantages)
    assert experience.ref_logprobs is None
    assert not [name for name in metrics if name.startswith("kl/")]
    for kl in (IN_REWARD, IN_LOSS):
        with pytest.raises(ValueError, match=rf'kl.place="{kl.place}" needs the refer'):
            group_experience(alone, kl=kl)


def test_weights_for_another_sampler():
    plain, _ = group_experience(SCORED)
    assert plain.weights is None
    corrected, metrics = group_experience(
        SCORED,
        policy_loss=PolicyLossOptions(sampler_correction="truncate", sampler_bound=1.5),
    )
    ratio = np.exp(LOGPROBS - SAMPLER)
    close(corrected.weights, np.where(MASK, np.minimum(ratio, 1.5), 0.0))
    close(metrics["sampler/beyond_bounds"], (ratio[MASK] > 1.5).mean())
    assert (ratio[MASK] > 1.5).any()


# ---- invariances ----


@pytest.mark.parametrize(("baseline", "scale"), COMPARED)
def test_answers_of_a_group_in_another_order(baseline, scale):
    groups = GroupOptions(baseline=baseline, scale=scale)
    order = np.array([2, 0, 1, 4, 3, 5, 7, 8, 6])
    shuffled = jax.tree.map(lambda x: x[order], SCORED)
    want, _ = group_experience(SCORED, kl=IN_REWARD, groups=groups)
    got, _ = group_experience(shuffled, kl=IN_REWARD, groups=groups)
    close(got.advantages, want.advantages[order])


@pytest.mark.parametrize(("baseline", "scale"), COMPARED)
def test_only_differences_inside_a_group_count(baseline, scale):
    # The deviation over the batch is that of one scale for all groups.
    shift = [4.0] * 3 if scale == "batch-std" else [4.0, -2.5, 0.5]
    moved = dataclasses.replace(SCORED, scores=SCORED.scores + np.repeat(shift, G))
    groups = GroupOptions(baseline=baseline, scale=scale)
    want, _ = group_experience(SCORED, kl=NO_KL, groups=groups)
    got, _ = group_experience(moved, kl=NO_KL, groups=groups)
    close(got.advantages, want.advantages)
    assert np.abs(np.asarray(want.advantages)).max() > 0.1


@pytest.mark.parametrize(("baseline", "scale"), COMPARED)
def test_equal_scores_teach_nothing(baseline, scale):
    same = dataclasses.replace(
        SCORED, scores=jnp.asarray(np.repeat([0.7, -3.3, 0.1], G), jnp.float32)
    )
    groups = GroupOptions(baseline=baseline, scale=scale)
    experience, metrics = group_experience(same, kl=NO_KL, groups=groups)
    np.testing.assert_array_equal(experience.advantages, np.zeros((B, T)))
    assert metrics["group/score_std"] == 0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"groups": GREEDY_OPTIONS}, "groups.baseline='greedy': give greedy responses"),
        (
            {"greedy": GREEDY_ANSWERS},
            "groups.baseline='leave-one-out': give greedy responses",
        ),
        ({"group_size": 4}, "group size 4: expected a divisor of the 9 scores"),
        (
            {"groups": GroupOptions(baseline="best-of-others", scale="signal")},
            "groups.scale='signal': with groups.baseline=best-of-others use one of",
        ),
        ({"groups": GroupOptions(gamma=0.9)}, "groups.gamma=0.9: has no effect"),
        (
            {"groups": GroupOptions(scale="none", ddof=0)},
            "groups.ddof=0: has no effect",
        ),
        ({"scores": ScoreOptions(position="after_last_token")}, "scores.position="),
        ({"scores": ScoreOptions(whiten_rewards=True)}, "scores.whiten-rewards=True: "),
        ({"scores": ScoreOptions(normalization="running")}, "scores.normalization="),
        ({"kl": KLOptions(place="loss")}, "kl.estimator='k1': "),
        (
            {"policy_loss": PolicyLossOptions(dual_clip=0.5)},
            "policy_loss.dual-clip=0.5: must be above 1",
        ),
    ],
)
def test_what_cannot_work_is_refused(options, start):
    with pytest.raises(ValueError) as refused:
        group_experience(SCORED, **options)
    assert str(refused.value).startswith(start)
    assert "\n" not in str(refused.value)


def test_ppo_needs_values():
    with pytest.raises(ValueError, match=r"^scored.values is None: [^\n]+$"):
        make_experience(SCORED, kl_coef=BETA)
