"""Options shared by PPO and GRPO.

The string below each field is its command-line help.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import (
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
    check,
)
from rlhf_jax.config.limits import MOST_COUNT, check_batch
from rlhf_jax.config.reward_sources import RewardSources, function_name
from rlhf_jax.config.run import FREE_ON_RESUME, RunConfig, check_positive
from rlhf_jax.data.encoding import Overlong


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyMethod:
    """Options shared by the methods with and without a critic."""

    temperature: float = 1.0
    """temperature of sampling and of all log-probabilities"""
    old_logprobs: Literal["auto", "sampler", "recomputed"] = "auto"
    """behavior log-probabilities: from the sampler, or recomputed as in training; auto
    recomputes where there is sampler–trainer numerical mismatch, that is everywhere but
    in float32 on CPU"""
    kl: KLOptions = dataclasses.field(default_factory=KLOptions)
    """KL to the reference"""
    scores: ScoreOptions = dataclasses.field(default_factory=ScoreOptions)
    """scores, and the token rewards computed from them"""
    policy_loss: PolicyLossOptions = dataclasses.field(
        default_factory=PolicyLossOptions
    )
    """loss of the policy"""
    epochs: int = 1
    """passes over each rollout"""
    minibatches: int = 1
    """optimizer steps per pass"""
    max_update_kl: float | None = None
    """end an update early once its KL to the behavior policy exceeds this, in nats per
    token; learning-rate schedules count the steps taken; None: never"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "must be above 0: training needs diverse responses",
        )
        check_positive(epochs=self.epochs, minibatches=self.minibatches)
        check(
            self.max_update_kl is None or self.max_update_kl > 0,
            "max-update-kl",
            self.max_update_kl,
            "must be above 0, or None",
        )
        check(
            self.max_update_kl is None or not self.learns_on_policy,
            "max-update-kl",
            self.max_update_kl,
            "has no effect: an update is one step (epochs=1, minibatches=1)",
        )
        check(
            self.policy_loss.sampler_correction == "none"
            or self.old_logprobs != "sampler",
            "policy-loss.sampler-correction",
            self.policy_loss.sampler_correction,
            "has no effect with old-logprobs=sampler; use old-logprobs=recomputed",
        )
        self.kl.validate("kl")
        self.policy_loss.validate("policy-loss")

    @property
    def learns_on_policy(self) -> bool:
        """Whether every gradient is taken at the behavior policy."""
        return self.epochs * self.minibatches == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(PolicyMethod, RewardSources, RunConfig):
    """Options shared by PPO and critic-free methods."""

    policy: str
    """Hugging Face directory of the initial policy, usually the SFT model"""
    data: str
    """prompts: rows with a prompt, or any format the other commands read; the other
    columns are passed to reward functions"""
    reference: str | None = None
    """Hugging Face directory of the frozen reference; None: the initial policy"""
    eval_data: str | None = None
    """held-out prompts; None: hold out eval-fraction of the prompts"""
    eval_fraction: float = 0.05
    """share of prompts held out if there is no eval-data"""
    eval_prompts: int = 64
    """held-out prompts per evaluation"""
    prompt_column: str = "prompt"
    """column of prompts"""
    unusable_prompts: Literal["fail", "drop"] = "fail"
    """how to handle blank prompts, and conversations that contain special tokens as
    text or that the chat template rejects"""
    updates: int = 100
    """number of updates, each one rollout and epochs passes over it"""
    batch_size: int = 64
    """responses per update"""
    microbatches: int = 1
    """gradient accumulation steps per minibatch, to save memory; results depend on them
    only with policy-loss.mean-of-means"""
    undo_updates: bool = True
    """undo all optimizer steps of an update if one of them has a NaN or infinite loss
    or gradient, so that the run can be resumed from the state before it; with several
    steps per update, this needs memory for a second copy of trainable parameters and
    optimizer state. False: nothing is saved then"""
    max_prompt_tokens: int = 64
    """maximum prompt length, in tokens"""
    overlong: Overlong = "drop"
    """how to handle longer prompts; truncate keeps their end"""
    max_new_tokens: int = 48
    """maximum response length, in tokens"""
    stop: tuple[str, ...] = ()
    """stop tokens, as text, besides the model's EOS; the reward model scores at
    whichever occurs"""

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.updates

    @property
    def undoes_updates(self) -> bool:
        """Whether a failed update leaves the state exactly as it was."""
        return self.undo_updates or self.epochs * self.minibatches == 1

    def models(self) -> dict[str, str]:
        """Option → checkpoint, for all models of the run."""
        found = {"policy": self.policy}
        if self.reference is not None:
            found["reference"] = self.reference
        if self.reward_model is not None:
            found["reward-model"] = self.reward_model
        return found | {f"ensemble {path}": path for path in self.ensemble}

    def input_files(self) -> dict[str, str | None]:
        """Option → file that the run reads; unchanged when a run resumes."""
        return {"data": self.data, "eval-data": self.eval_data}

    def tokenizer_source(self) -> str | None:
        """The checkpoint with the tokenizer and chat template of the run."""
        return self.policy

    def reward_files(self) -> tuple[str, ...]:
        """Reward functions in files, as `file.py:function`."""
        specs = (*self.reward, *self.eval_reward)
        return tuple(spec for spec in specs if ".py:" in spec)

    def unsaved_models(self) -> dict[str, str | None]:
        """Option → checkpoint whose weights the run reads but does not save."""
        return {
            **self.models(),
            "policy": self.policy if self._reads_start_of_policy() else None,
            "lora.adapter": self.lora.adapter,
        }

    def free_on_resume(self) -> tuple[str, ...]:
        """Options that a resumed run may change."""
        if self.policy_loss.mean_of_means:
            return FREE_ON_RESUME
        return super().free_on_resume()

    def _reads_start_of_policy(self) -> bool:
        """Whether the policy's checkpoint is the base of adapters, or the reference."""
        is_reference = self.kl.place != "none" and self.reference is None
        return self.lora.is_on or is_reference

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        RunConfig.validate(self)
        check(
            self.lora.dropout == 0,
            "lora.dropout",
            self.lora.dropout,
            "must be 0 for ppo and grpo: with dropout, the ratio between policy and "
            "behavior policy is not 1 at the first step",
        )
        self.validate_rewards()
        check_positive(
            updates=self.updates,
            batch_size=self.batch_size,
            microbatches=self.microbatches,
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            eval_prompts=self.eval_prompts,
        )
        check(
            self.eval_data is not None or 0 < self.eval_fraction < 1,
            "eval-fraction",
            self.eval_fraction,
            "must be in (0, 1) without eval-data",
        )

    def _check_sizes(self) -> None:
        """Checks that depend on both method and sizes."""
        tokens = self.max_prompt_tokens + self.max_new_tokens
        columns = "max-prompt-tokens and max-new-tokens"
        check_batch(self.batch_size, tokens, columns=columns)
        steps = self.updates * self.epochs * self.minibatches
        check(
            steps <= MOST_COUNT,
            "updates",
            self.updates,
            f"times epochs {self.epochs} times minibatches {self.minibatches} must be "
            f"at most {MOST_COUNT}",
        )
        measured = self._held_out_metrics()
        check(
            self.early_stop is None or self.early_stop in measured,
            "early-stop",
            self.early_stop,
            f"must be a held-out metric of this run: {', '.join(measured)}",
        )
        devices = self.mesh.data * self.mesh.fsdp
        parts = self.minibatches * self.microbatches * devices
        check(
            self.batch_size % parts == 0,
            "batch-size",
            self.batch_size,
            f"must be a multiple of {parts} = minibatches {self.minibatches} × "
            f"microbatches {self.microbatches} × devices {devices}",
        )
        buffer = self.scores.overlong_buffer
        check(
            buffer is None or buffer <= self.max_new_tokens,
            "scores.overlong-buffer",
            buffer,
            f"must be at most max-new-tokens={self.max_new_tokens}",
        )
        check(
            self.reference is None or self.kl.place != "none",
            "reference",
            self.reference,
            "has no effect with kl.place=none",
        )

    def _held_out_metrics(self) -> list[str]:
        """Metrics that `HeldOut` computes."""
        names = ["score_mean", "score_std", "length_mean", "stop_rate"]
        if self.kl.place != "none":
            names.append("kl_sequence")
        functions = [*self.eval_reward, *self.reward]
        names += [f"reward/{function_name(spec)}" for spec in functions]
        if functions and self.eval_pass is not None:
            powers = range(self.eval_samples.bit_length())
            names += [f"pass_at_{2**power}" for power in powers]
        return [f"eval/{name}" for name in names]
