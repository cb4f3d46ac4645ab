"""GRPO and related methods, each as a complete preset.

A preset sets the method only. Models, data, batch size, lengths and rewards are left
to the run, and so are learning rates: papers report them for models a thousand times
larger than what fits a laptop (1e-6 is common). Each function returns a `GRPOMethod`,
to be modified with `dataclasses.replace`; on the command line,
`rlhf-jax grpo --preset dapo`, followed by flags.
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
    """GRPO as in DeepSeekMath: (s − μ)/σ, KL in the loss, mean of per-response means.

    Difference from the paper: G = 64 there (`--group-size 64`). This command's defaults
    differ on purpose: each score minus the mean of the others, not divided, and the KL
    in the reward as k1. Together they give the exact gradient. Dividing by σ changes
    its direction, and k3 in the loss has the gradient of KL(π_ref‖π), not KL(π‖π_ref)
    (docs/what-is-unbiased.md).

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

    A response's token losses are summed and divided by a constant, the maximum response
    length, so neither the gradient's direction nor the effect of norm clipping depends
    on the lengths.

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

    It is on-policy, so there is no ratio to clip. A response's token losses are summed
    and divided by the maximum response length: the gradient is exact up to that
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
    """REINFORCE++: rewards-to-go including the KL, whitened over the batch.

    One response per prompt; the batch mean is the baseline.

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
    """ReMax: rewards-to-go minus the greedy response's score; one response per prompt.

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
    """DAPO: asymmetric clip, mean over tokens, no KL, dynamic sampling.

    Groups whose scores have zero variance are replaced, for up to four rounds.
    Truncated responses are masked from the loss but count in their group's statistics.
    The overlong penalty depends on the length limit, so it is not in the preset: set
    `--scores.overlong-buffer`, in the paper a fifth of `--max-new-tokens`; the penalty
    of truncated responses then affects only group statistics. The paper has G = 16.

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
    """GSPO: GRPO with one ratio per response, within −3e-4 and +4e-4 of 1.

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
    """CISPO: GRPO with clipped ratios as weights, which keep all gradients; no KL.

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
