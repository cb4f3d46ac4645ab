"""Options shared by PPO and GRPO.

The string below each field is its command-line help.
"""

import dataclasses
import math
from typing import Literal

from rlhf_jax.algo.options import (
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
    check,
    require_defaults,
)
from rlhf_jax.algo.scores import EnsembleScore
from rlhf_jax.config.run import FREE_ON_RESUME, RunConfig, check_positive
from rlhf_jax.data.encoding import Overlong


def function_name(spec: str) -> str:
    """Name of a reward function in metrics, such as `exact_answer`."""
    return spec.rpartition(":")[2]


# Columns of the samples, and metrics after `reward/`: reward functions are logged there
# under their names.
_TAKEN_NAMES = (
    "step",
    "prompt",
    "response",
    "score",
    "kl",
    "score_mean",
    "score_std",
    "shaped_mean",
    "normalization_mean",
    "normalization_std",
    "greedy_mean",
    "model",
    "failures",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSources:
    """Sources of rewards, in training and on held-out prompts."""

    reward_model: str | None = None
    """Hugging Face directory of a frozen reward model"""
    reward_model_weight: float = 1.0
    """weight of the reward model, or ensemble, relative to reward functions"""
    ensemble: tuple[str, ...] = ()
    """Hugging Face directories of further reward models, forming an ensemble with the
    first"""
    ensemble_score: EnsembleScore = "worst"
    """score of an ensemble: the mean, the lowest, or the mean minus ensemble-penalty
    standard deviations; its models need a common zero (center-coef of rlhf-jax
    reward)"""
    ensemble_penalty: float = 1.0
    """standard deviations subtracted by mean-minus-std"""
    reward: tuple[str, ...] = ()
    """reward functions, file.py:function or package.module:function, called as
    function(prompts, responses, columns) and returning a number per row; columns holds
    the other columns of the data. rlhf_jax.tasks.verifiable has exact_answer and
    reasoning_format"""
    reward_weights: tuple[float, ...] = ()
    """weights of the reward functions in the sum; empty: 1 each"""
    reward_columns: tuple[str, ...] = ()
    """columns of the data passed to reward functions, required in every row; empty:
    those that are not null in the first row"""
    reward_processes: int = 2
    """worker processes for reward functions"""
    reward_time_limit: float = 5.0
    """seconds before a reward function call fails"""
    reward_on_failure: float | None = None
    """score of responses on which a reward function fails; None: stop the run"""
    eval_reward: tuple[str, ...] = ()
    """reward functions evaluated on held-out responses only"""
    eval_samples: int = 1
    """responses per held-out prompt"""
    eval_pass: float | None = 1.0
    """lowest score at which a held-out response passes, by the first function of
    eval-reward, else of reward; None: no pass rates"""
    early_stop: str | None = None
    """held-out metric for early stopping, higher is better, such as eval/score_mean or
    eval/reward/exact_answer; saves the best policy. None: save the last one"""
    early_stop_patience: int = 3
    """evaluations without a new best before training ends"""

    def validate_rewards(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            self.reward_model is not None or bool(self.reward),
            "reward-model",
            None,
            "no reward given; set reward-model (a directory) or reward "
            "(functions, file.py:function)",
        )
        check(
            math.isfinite(self.reward_model_weight) and self.reward_model_weight != 0,
            "reward-model-weight",
            self.reward_model_weight,
            "must be finite and nonzero; to disable the reward model, leave it out",
        )
        if self.reward_model is None:
            why = "requires --reward-model"
            require_defaults(self, "", "reward_model_weight", "ensemble", why=why)
        if not self.ensemble:
            why = "requires an ensemble; add reward models with --ensemble"
            require_defaults(self, "", "ensemble_score", why=why)
        if self.ensemble_score != "mean-minus-std":
            why = "requires ensemble-score=mean-minus-std"
            require_defaults(self, "", "ensemble_penalty", why=why)
        check(
            self.ensemble_penalty >= 0,
            "ensemble-penalty",
            self.ensemble_penalty,
            "must not be negative",
        )
        self._check_functions()
        check_positive(
            eval_samples=self.eval_samples,
            early_stop_patience=self.early_stop_patience,
        )
        if self.early_stop is None:
            why = "has no effect without early-stop"
            require_defaults(self, "", "early_stop_patience", why=why)

    def _check_functions(self) -> None:
        if not self.reward and not self.eval_reward:
            why = "requires a reward function; there are none"
            of_functions = ("columns", "processes", "time_limit", "on_failure")
            of_functions = [f"reward_{name}" for name in of_functions]
            require_defaults(self, "", *of_functions, "eval_pass", why=why)
        check(
            len(self.reward_weights) in (0, len(self.reward)),
            "reward-weights",
            self.reward_weights,
            f"give one for each of the {len(self.reward)} reward functions",
        )
        names = [function_name(spec) for spec in (*self.reward, *self.eval_reward)]
        twice = [name for name in names if names.count(name) > 1]
        check(
            not twice,
            "reward",
            twice[:1],
            "two functions have this name, which metrics use; rename one",
        )
        taken = [name for name in names if name in _TAKEN_NAMES]
        check(
            not taken,
            "reward",
            taken[:1],
            "is already the name of a metric or sample column; rename the function",
        )
        check_positive(reward_processes=self.reward_processes)
        check(
            0 < self.reward_time_limit < math.inf,
            "reward-time-limit",
            self.reward_time_limit,
            "must be positive and finite",
        )
        check(
            all(map(math.isfinite, self.reward_weights)),
            "reward-weights",
            self.reward_weights,
            "must be finite numbers",
        )
        check(
            self.reward_on_failure is None or math.isfinite(self.reward_on_failure),
            "reward-on-failure",
            self.reward_on_failure,
            "must be a finite number, or None",
        )


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
