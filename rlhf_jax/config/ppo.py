"""The options of `rlhf-jax ppo`; presets set those of the method alone."""

import dataclasses
from typing import ClassVar, Literal

from rlhf_jax.algo.options import (
    AdvantageOptions,
    ValueLossOptions,
    check,
    check_bootstrap,
    require_defaults,
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
    """PPO, except for models, data and sizes."""

    after_stop: Literal["cut", "keep"] = "cut"
    """end responses at their stop token; or continue to the length limit and train on
    all tokens, while the reward model reads only up to the stop token"""
    advantages: AdvantageOptions = dataclasses.field(default_factory=AdvantageOptions)
    """advantages and value targets"""
    value_loss: ValueLossOptions = dataclasses.field(default_factory=ValueLossOptions)
    """loss of the critic"""
    epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 4
    """optimizer steps per pass"""
    critic_trunk: Literal["own", "shared"] = "own"
    """the critic is a separate network, or a second head on the policy"""
    critic_head_std: float | None = None
    """reinitialize the critic's head with this standard deviation, 0 for V = 0; None:
    as loaded, or 1/sqrt(width + 1) for a new head"""
    critic_warmup: int = 0
    """initial updates that train only the critic (only its head with a shared trunk);
    the policy's learning-rate schedule starts after them"""
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
        PolicyMethod.validate(self)
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
            why = "requires responses that end, so not after-stop=keep"
            require_defaults(
                self.scores, "scores", "position", "overlong_buffer", why=why
            )
            require_defaults(self.advantages, "advantages", "lam_alpha", why=why)
        check(
            self.critic_trunk == "own" or self.advantages.slow_critic_decay is None,
            "advantages.slow-critic-decay",
            self.advantages.slow_critic_decay,
            "requires critic-trunk=own",
        )
        check(
            self.policy_loss.surrogate != "reinforce" or self.learns_on_policy,
            "policy-loss.surrogate",
            "reinforce",
            "has no importance ratio, so it must be on-policy; use epochs=1 and "
            "minibatches=1, or another surrogate",
        )
        check_bootstrap(self.advantages, self.scores)
        self.scores.validate("scores")
        self.advantages.validate("advantages")
        self.value_loss.validate("value-loss")
        self.actor_optimizer.validate("actor-optimizer")
        self.critic_optimizer.validate("critic-optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(PPOMethod, PolicyConfig):
    """PPO with a critic, on a reward model, reward functions or both.

    --preset NAME sets every option of the method as in a known implementation:
    openai_2019, nplus_tldr, trl, openrlhf, verl or deepspeed_chat (`rlhf-jax presets`
    lists them). Flags and --config override it.
    """

    stage: ClassVar[str] = "ppo"

    critic: str | None = None
    """Hugging Face directory of the initial critic; None: the reward model, or else the
    policy with a new head"""

    @property
    def critic_path(self) -> str:
        """Checkpoint of the initial critic, if it is a separate network."""
        return self.critic or self.reward_model or self.policy

    def models(self) -> dict[str, str]:
        """Option → checkpoint, for all models of the run."""
        if self.critic_trunk == "shared":
            return super().models()
        return super().models() | {"critic": self.critic_path}

    def unsaved_models(self) -> dict[str, str | None]:
        """Option → checkpoint whose weights the run reads but does not save."""
        critic = self.critic if self.lora.is_on else None
        return super().unsaved_models() | {"critic": critic}

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rates by flag, without the dashes."""
        return {
            "actor-optimizer.learning-rate": self.actor_optimizer.learning_rate,
            "critic-optimizer.learning-rate": self.critic_optimizer.learning_rate,
        }

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        PolicyConfig.validate(self)
        PPOMethod.validate(self)
        check_temperature(self.temperature, smallest=SMALLEST_TO_LEARN)
        self._check_sizes()
        check(
            self.critic_warmup < self.updates,
            "critic-warmup",
            self.critic_warmup,
            f"must be below updates={self.updates}, or the policy is never trained",
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
            "has no effect with critic-trunk=shared",
        )
        check(
            self.scores.normalization != "reference" or self.kl.place != "none",
            "scores.normalization",
            self.scores.normalization,
            "requires a reference; use running, or kl.place=reward or loss",
        )
