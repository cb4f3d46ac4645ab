"""The options of `rlhf-jax grpo`, and its method alone: presets are those."""

import dataclasses

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
    """Everything about learning without a critic that is not model, data or size."""

    group_size: int = 8
    """G, answers per prompt"""
    groups: GroupOptions = dataclasses.field(default_factory=GroupOptions)
    """advantages of answers against each other"""
    resample: int = 0
    """rounds of further prompts for groups without a signal, whose answers that are
    trained on all have one score; 0: such groups stay in the batch"""
    refresh_every: int = 1
    """updates after which the policy that answers becomes the one that learns"""
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
        super().validate()
        check_positive(group_size=self.group_size, refresh_every=self.refresh_every)
        self.groups.validate("groups")
        self.scores.validate_without_critic("scores")
        self.optimizer.validate("optimizer")
        self._check_groups()
        check(
            self.policy_loss.surrogate != "reinforce" or self.learns_on_policy,
            "policy-loss.surrogate",
            "reinforce",
            "has no ratio that would notice that the policy has moved: take epochs=1, "
            "minibatches=1 and refresh-every=1, or another surrogate",
        )

    @property
    def learns_on_policy(self) -> bool:
        """Whether every gradient is of the policy that wrote the responses."""
        return super().learns_on_policy and self.refresh_every == 1

    def _check_groups(self) -> None:
        check(
            self.group_size > 1 or not self.groups.compares,
            "group-size",
            self.group_size,
            f"groups.baseline={self.groups.baseline} compares the answers to one "
            "prompt with each other, so it needs at least 2",
        )
        check(self.resample >= 0, "resample", self.resample, "must not be negative")
        check(
            self.resample == 0 or self.groups.compares,
            "resample",
            self.resample,
            f"is for groups without a signal; with groups.baseline="
            f"{self.groups.baseline} a group of equal scores has one",
        )
        of_scores = ("std", "batch-std", "signal")
        check(
            self.kl.place != "reward" or self.groups.scale not in of_scores,
            "groups.scale",
            self.groups.scale,
            "is of scores alone, and with kl.place=reward the KL is in them; where all "
            "scores are equal it would scale up the KL: take groups.scale=none, or "
            "kl.place=loss or none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(GRPOMethod, PolicyConfig):
    """GRPO and its relatives: several answers per prompt instead of a critic.

    --preset NAME takes every option of the method from a paper: grpo, dr_grpo, rloo,
    reinforce_pp, reinforce_pp_baseline, remax, dapo, gspo or cispo
    (`rlhf-jax presets --command grpo` lists them). Options given beside it override
    it, and so does a file.
    """

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        PolicyConfig.validate(self)
        GRPOMethod.validate(self)
        check_temperature(self.temperature, smallest=SMALLEST_TO_LEARN)
        self._check_method(self)
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
            f"makes {num_prompts} prompts at group-size={self.group_size}, whose "
            f"likeliest answers cannot be split over {devices} devices",
        )
        check(
            self.refresh_every <= self.updates,
            "refresh-every",
            self.refresh_every,
            f"must be at most updates={self.updates}, or the policy that answers never "
            "changes",
        )
