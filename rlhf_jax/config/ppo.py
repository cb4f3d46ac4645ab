"""The options of `rlhf-jax ppo`, and its method alone: presets are those."""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import (
    AdvantageOptions,
    ValueLossOptions,
    check,
    check_bootstrap,
)
from rlhf_jax.algo.temperature import SMALLEST_TO_LEARN, check_temperature
from rlhf_jax.config.policy import PolicyConfig, PolicyMethod
from rlhf_jax.config.run import OptimizerConfig


def _actor_optimizer() -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1e-4, schedule="linear", end_fraction=0.0, b2=0.999, eps=1e-5
    )


def _critic_optimizer() -> OptimizerConfig:
    return dataclasses.replace(_actor_optimizer(), learning_rate=3e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOMethod(PolicyMethod):
    """Everything about PPO that is neither model, data nor size."""

    after_stop: Literal["cut", "keep"] = "cut"
    """an answer ends at its stop token; or goes on to the limit, and is trained on, but
    the reward model reads it only through the stop token"""
    advantages: AdvantageOptions = dataclasses.field(default_factory=AdvantageOptions)
    """advantages and value targets"""
    value_loss: ValueLossOptions = dataclasses.field(default_factory=ValueLossOptions)
    """loss of the critic"""
    epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 4
    """optimizer steps per pass"""
    critic_trunk: Literal["own", "shared"] = "own"
    """the critic is a network of its own, or a second head on the policy"""
    critic_head_std: float | None = None
    """draw the critic's head anew with this standard deviation, 0 for V = 0; None: as
    loaded, or 1/sqrt(width + 1) where there is none to load"""
    critic_warmup: int = 0
    """updates at the start in which only the critic learns (on a shared trunk only its
    head does); the policy's learning rate starts to fall after them"""
    actor_optimizer: OptimizerConfig = dataclasses.field(
        default_factory=_actor_optimizer
    )
    """optimizer of the policy"""
    critic_optimizer: OptimizerConfig = dataclasses.field(
        default_factory=_critic_optimizer
    )
    """optimizer of the critic"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        check(
            self.critic_head_std is None or self.critic_head_std >= 0,
            "critic-head-std",
            self.critic_head_std,
            "must not be negative",
        )
        check(
            self.critic_warmup >= 0,
            "critic-warmup",
            self.critic_warmup,
            "must not be negative",
        )
        if self.after_stop == "keep":
            why = "takes answers that end; under after-stop=keep none does"
            self.scores.require_defaults(
                "scores", "position", "overlong_buffer", why=why
            )
            self.advantages.require_defaults("advantages", "lam_alpha", why=why)
        check(
            self.critic_trunk == "own" or self.advantages.slow_critic_decay is None,
            "advantages.slow-critic-decay",
            self.advantages.slow_critic_decay,
            "needs a critic of its own: critic-trunk=own",
        )
        check(
            self.policy_loss.surrogate != "reinforce" or self.learns_on_policy,
            "policy-loss.surrogate",
            "reinforce",
            "has no ratio that would notice that the policy has moved: take epochs=1 "
            "and minibatches=1, or another surrogate",
        )
        check_bootstrap(self.advantages, self.scores)
        self.scores.validate("scores")
        self.advantages.validate("advantages")
        self.value_loss.validate("value-loss")
        self.actor_optimizer.validate("actor-optimizer")
        self.critic_optimizer.validate("critic-optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(PPOMethod, PolicyConfig):
    """PPO with a critic, against a reward model, reward functions or both.

    --preset NAME takes every option of the method from a known implementation:
    openai_2019, nplus_tldr, trl, openrlhf, verl or deepspeed_chat (`rlhf-jax presets`
    lists them). Options given beside it override it, and so does a file.
    """

    critic: str | None = None
    """Hugging Face directory the critic starts from; without it the reward model, or
    else the policy with a fresh head"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        PolicyConfig.validate(self)
        PPOMethod.validate(self)
        check_temperature(self.temperature, smallest=SMALLEST_TO_LEARN)
        self._check_method(self)
        check(
            self.critic_warmup < self.updates,
            "critic-warmup",
            self.critic_warmup,
            f"must be below updates={self.updates}, or the policy never learns",
        )
        check(
            self.batch_size % self.advantages.whiten_shards == 0,
            "advantages.whiten-shards",
            self.advantages.whiten_shards,
            f"must divide batch-size={self.batch_size}",
        )
        check(
            self.critic is None or self.critic_trunk == "own",
            "critic",
            self.critic,
            "is not used under critic-trunk=shared",
        )
        check(
            self.scores.normalization != "reference" or self.kl.place != "none",
            "scores.normalization",
            self.scores.normalization,
            "needs a reference; take running, or another kl.place than none",
        )
