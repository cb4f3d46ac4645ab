"""The options of `rlhf-jax grpo`; presets set those of the method alone."""

import dataclasses
from typing import ClassVar

from rlhf_jax.algo.options import (
    GroupOptions,
    KLOptions,
    check,
)
from rlhf_jax.algo.temperature import SMALLEST_TO_LEARN, check_temperature
from rlhf_jax.config.policy import PolicyConfig, PolicyMethod
from rlhf_jax.config.run import OptimizerConfig, check_positive


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1e-4, schedule="linear", end_fraction=0.0, b2=0.999
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOMethod(PolicyMethod):
    """Critic-free training, except for models, data and sizes."""

    group_size: int = 8
    """G, responses per prompt"""
    groups: GroupOptions = dataclasses.field(default_factory=GroupOptions)
    """group-relative advantages"""
    resample: int = 0
    """extra sampling rounds to replace groups whose scores have zero variance over the
    responses that are trained on; 0: keep such groups"""
    refresh_every: int = 1
    """sync the behavior policy every N updates"""
    kl: KLOptions = dataclasses.field(default_factory=lambda: KLOptions(coef=0.01))
    """KL to the reference"""
    epochs: int = 1
    """passes over each rollout"""
    minibatches: int = 2
    """optimizer steps per pass"""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=_optimizer)
    """optimizer of the policy"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        PolicyMethod.validate(self)
        check_positive(group_size=self.group_size, refresh_every=self.refresh_every)
        self.groups.validate("groups")
        self.scores.validate_without_critic("scores")
        self.optimizer.validate("optimizer")
        self._check_groups()
        check(
            self.policy_loss.surrogate != "reinforce" or self.learns_on_policy,
            "policy-loss.surrogate",
            "reinforce",
            "has no importance ratio, so it must be on-policy; use epochs=1, "
            "minibatches=1 and refresh-every=1, or another surrogate",
        )

    @property
    def learns_on_policy(self) -> bool:
        """Whether every gradient is taken at the behavior policy."""
        return super().learns_on_policy and self.refresh_every == 1

    def _check_groups(self) -> None:
        check(
            self.group_size > 1 or not self.groups.compares,
            "group-size",
            self.group_size,
            f"must be at least 2 with groups.baseline={self.groups.baseline}, which "
            "compares responses to the same prompt",
        )
        check(self.resample >= 0, "resample", self.resample, "must not be negative")
        check(
            self.resample == 0 or self.groups.compares,
            "resample",
            self.resample,
            f"is for zero-variance groups, which have a signal with groups.baseline="
            f"{self.groups.baseline}; leave it at 0",
        )
        of_scores = ("std", "batch-std", "signal")
        check(
            self.kl.place != "reward" or self.groups.scale not in of_scores,
            "groups.scale",
            self.groups.scale,
            "cannot be combined with kl.place=reward: groups of equal scores would "
            "scale up the KL; use groups.scale=none, or kl.place=loss or none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(GRPOMethod, PolicyConfig):
    """GRPO and related methods: several responses per prompt instead of a critic.

    --preset NAME sets every option of the method as in a paper: grpo, dr_grpo, rloo,
    reinforce_pp, reinforce_pp_baseline, remax, dapo, gspo or cispo
    (`rlhf-jax presets --command grpo` lists them). Flags and --config override it.
    """

    stage: ClassVar[str] = "grpo"

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate by flag, without the dashes."""
        return {"optimizer.learning-rate": self.optimizer.learning_rate}

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        PolicyConfig.validate(self)
        GRPOMethod.validate(self)
        check_temperature(self.temperature, smallest=SMALLEST_TO_LEARN)
        self._check_sizes()
        check(
            self.batch_size % self.group_size == 0,
            "batch-size",
            self.batch_size,
            f"must be a multiple of group-size={self.group_size}",
        )
        devices = self.mesh.data * self.mesh.fsdp
        num_prompts = self.batch_size // self.group_size
        check(
            self.groups.baseline != "greedy" or num_prompts % devices == 0,
            "batch-size",
            self.batch_size,
            f"gives {num_prompts} prompts with group-size={self.group_size}, whose "
            f"greedy responses cannot be split over {devices} devices",
        )
        check(
            self.refresh_every <= self.updates,
            "refresh-every",
            self.refresh_every,
            f"must be at most updates={self.updates}, or the behavior policy never "
            "changes",
        )
