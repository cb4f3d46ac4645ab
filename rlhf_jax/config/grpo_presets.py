"""GRPO and its relatives, each as a complete method.

A preset says how, not on what: models, data, batch size, lengths and rewards are left
to the run, and so are learning rates, which papers give for models a thousand times
the size of what fits a laptop (1e-6 is common). Each returns a `GRPOMethod` that can be
changed further with `dataclasses.replace`; on the command line,
`rlhf-jax grpo --preset dapo`, and flags after it.
"""

from rlhf_jax.algo.options import (
    GroupOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
)
from rlhf_jax.config.grpo import GRPOMethod

NO_KL = KLOptions(place="none")


def grpo() -> GRPOMethod:
    """GRPO as in DeepSeekMath: (s − μ)/σ, KL in the loss, mean over answers of means.

    Departs from its paper: G = 64 there, which `--group-size 64` gives. The defaults of
    this command differ on purpose: each score minus the mean of the others, undivided,
    and the KL in the reward as k1, which together have the exact gradient. Division by
    σ changes its direction, and k3 in the loss has the gradient of the KL the other way
    round (docs/what-is-unbiased.md).

    References:
        Shao et al., 2024, arXiv:2402.03300.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="mean", scale="std"),
        kl=KLOptions(place="loss", estimator="k3", coef=0.04),
        policy_loss=PolicyLossOptions(aggregation="seq-mean-token-mean"),
        minibatches=1,
    )


def dr_grpo() -> GRPOMethod:
    """Dr. GRPO, "GRPO done right": s − μ, no division by σ or by lengths, no KL.

    An answer's losses are summed over its tokens and divided by a constant, the limit
    of answers, so that neither the direction of the gradient nor what clipping its norm
    does to it depends on how long they are.

    References:
        Liu et al., 2025, arXiv:2503.20783.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="mean", scale="none"),
        kl=NO_KL,
        policy_loss=PolicyLossOptions(aggregation="seq-mean-token-sum-norm"),
    )


def rloo() -> GRPOMethod:
    """RLOO: s − the mean of the others, KL in the reward, one step per rollout.

    On policy there is no ratio to clip. Losses are summed over an answer's tokens and
    divided by the limit of answers, a constant: the gradient is exact but for that
    constant factor.

    References:
        Ahmadian et al., 2024, arXiv:2402.14740.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="leave-one-out", scale="none"),
        kl=KLOptions(coef=0.03),
        policy_loss=PolicyLossOptions(
            surrogate="reinforce", aggregation="seq-mean-token-sum-norm"
        ),
        minibatches=1,
    )


def reinforce_pp() -> GRPOMethod:
    """REINFORCE++: rewards to go with the KL in them, whitened over the batch.

    One answer per prompt: what the batch earned is the baseline.

    References:
        Hu et al., 2025, arXiv:2501.03262.
    """
    return GRPOMethod(
        group_size=1,
        groups=GroupOptions(baseline="none", scale="tokens", ddof=0),
        kl=KLOptions(coef=0.01),
    )


def reinforce_pp_baseline() -> GRPOMethod:
    """REINFORCE++-baseline: s − μ of the group, whitened over the batch; KL as k2.

    References:
        Hu et al., 2025, arXiv:2501.03262.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="mean", scale="tokens", ddof=0),
        kl=KLOptions(place="loss", estimator="k2", coef=0.01),
    )


def remax() -> GRPOMethod:
    """ReMax: rewards to go minus the score of the likeliest answer; one answer each.

    References:
        Li et al., 2023, arXiv:2310.10505.
    """
    return GRPOMethod(
        group_size=1,
        groups=GroupOptions(baseline="greedy", scale="none"),
        kl=KLOptions(coef=0.03),
        policy_loss=PolicyLossOptions(
            surrogate="reinforce", aggregation="seq-mean-token-sum-norm"
        ),
        minibatches=1,
    )


def dapo() -> GRPOMethod:
    """DAPO: clip higher above than below, mean over tokens, no KL, no idle groups.

    Groups without a signal are replaced, for up to four rounds; answers that never
    stop are left out of the loss, but count in their group. Its ramp for long answers
    needs their limit: `--scores.overlong-buffer`, a fifth of `--max-new-tokens` there;
    what it takes off then reaches only the mean of the group. G = 16 there.

    References:
        Yu et al., 2025, arXiv:2503.14476.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="mean", scale="std"),
        resample=4,
        kl=NO_KL,
        scores=ScoreOptions(missing_eos="mask"),
        policy_loss=PolicyLossOptions(clip_eps=0.2, clip_eps_high=0.28),
    )


def gspo() -> GRPOMethod:
    """GSPO: GRPO with one ratio per answer, within −3e-4 and +4e-4 of 1.

    References:
        Zheng et al., 2025, arXiv:2507.18071.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="mean", scale="std"),
        kl=NO_KL,
        policy_loss=PolicyLossOptions(
            surrogate="gspo",
            clip_eps=3e-4,
            clip_eps_high=4e-4,
            aggregation="seq-mean-token-mean",
        ),
        minibatches=4,
    )


def cispo() -> GRPOMethod:
    """CISPO: GRPO whose ratios weigh tokens and never silence one; no KL.

    References:
        MiniMax, 2025, arXiv:2506.13585.
    """
    return GRPOMethod(
        groups=GroupOptions(baseline="mean", scale="std"),
        kl=NO_KL,
        policy_loss=PolicyLossOptions(surrogate="cispo"),
        minibatches=4,
    )


GRPO_PRESETS = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
}
