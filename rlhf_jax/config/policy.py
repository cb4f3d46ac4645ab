"""The configurations of the stages that train a policy by reward: flags, keys, help.

The string below each field is its help on the command line.
"""

import dataclasses
import math
from typing import Literal

from rlhf_jax.algo.options import KLOptions, PolicyLossOptions, ScoreOptions, check
from rlhf_jax.algo.scores import EnsembleScore
from rlhf_jax.config.run import Overlong, RunConfig, check_positive


def function_name(spec: str) -> str:
    """What metrics call the function of a spec: `exact_answer`."""
    return spec.rpartition(":")[2]


# Columns of the samples, and metrics after `reward/`: the places where what a function
# says is written under its name.
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
    """Where the reward of an answer comes from, in training and on held-out prompts."""

    reward_model: str | None = None
    """Hugging Face directory of a frozen reward model"""
    reward_model_weight: float = 1.0
    """of the reward model, or the ensemble, beside reward functions"""
    ensemble: tuple[str, ...] = ()
    """Hugging Face directories of further reward models, which judge with the first"""
    ensemble_score: EnsembleScore = "worst"
    """one score of several: the mean, the lowest, or the mean minus ensemble-penalty
    standard deviations; models need a common zero (center-coef of rlhf-jax reward)"""
    ensemble_penalty: float = 1.0
    """standard deviations that mean-minus-std takes off"""
    reward: tuple[str, ...] = ()
    """reward functions, file.py:function or package.module:function, called as
    function(prompts, responses, columns) and returning a number per row; columns holds
    the other columns of the data. rlhf_jax.tasks.verifiable has exact_answer and
    reasoning_format"""
    reward_weights: tuple[float, ...] = ()
    """of the reward functions in the sum; without them, 1 each"""
    reward_columns: tuple[str, ...] = ()
    """columns of the data that reward functions get, which every row must have; without
    them, those that the first row has and that are not null there"""
    reward_processes: int = 2
    """worker processes that call reward functions"""
    reward_time_limit: float = 5.0
    """seconds after which a call of a reward function has failed"""
    reward_on_failure: float | None = None
    """score of an answer at which a reward function fails; None: the run stops"""
    eval_reward: tuple[str, ...] = ()
    """reward functions that are measured on held-out answers only"""
    eval_samples: int = 1
    """answers to each held-out prompt"""
    eval_pass: float | None = 1.0
    """a held-out answer passes with at least this score by the first function of
    eval-reward, or else of reward; None: pass rates are left out"""
    early_stop: str | None = None
    """held-out metric that must go on rising, such as eval/score_mean or
    eval/reward/exact_answer; the policy that is written is the best by it. None: the
    last one is written"""
    early_stop_patience: int = 3
    """evaluations without a new best after which training ends"""

    def validate_rewards(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            self.reward_model is not None or bool(self.reward),
            "reward-model",
            None,
            "name what to learn from: reward-model (a directory) or reward "
            "(functions, file.py:function)",
        )
        check(
            math.isfinite(self.reward_model_weight) and self.reward_model_weight != 0,
            "reward-model-weight",
            self.reward_model_weight,
            "must be a finite number other than 0; leave the model out instead",
        )
        if self.reward_model is None:
            why = "is for a reward-model, which there is none of"
            self._require_defaults("reward_model_weight", "ensemble", why=why)
        if not self.ensemble:
            why = "is for an ensemble: name further reward models there"
            self._require_defaults("ensemble_score", why=why)
        if self.ensemble_score != "mean-minus-std":
            why = "is for ensemble-score=mean-minus-std"
            self._require_defaults("ensemble_penalty", why=why)
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
            why = "does nothing without early-stop"
            self._require_defaults("early_stop_patience", why=why)

    def _check_functions(self) -> None:
        if not self.reward and not self.eval_reward:
            why = "is for reward functions, and there are none"
            of_functions = ("columns", "processes", "time_limit", "on_failure")
            of_functions = [f"reward_{name}" for name in of_functions]
            self._require_defaults(*of_functions, "eval_pass", why=why)
        check(
            len(self.reward_weights) in (0, len(self.reward)),
            "reward-weights",
            self.reward_weights,
            f"give one for each of the {len(self.reward)} functions of reward",
        )
        names = [function_name(spec) for spec in (*self.reward, *self.eval_reward)]
        twice = [name for name in names if names.count(name) > 1]
        check(
            not twice,
            "reward",
            twice[:1],
            "two functions of one name; metrics are called by it, so rename one",
        )
        taken = [name for name in names if name in _TAKEN_NAMES]
        check(
            not taken,
            "reward",
            taken[:1],
            "a metric, or a column of the samples, has this name already; rename the "
            "function",
        )
        check_positive(reward_processes=self.reward_processes)
        check(
            0 < self.reward_time_limit < math.inf,
            "reward-time-limit",
            self.reward_time_limit,
            "must be above 0 seconds, and finite",
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

    def _require_defaults(self, *names: str, why: str) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(RewardSources)}
        for name in names:
            value = vars(self)[name]
            check(value == defaults[name], name.replace("_", "-"), value, why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyMethod:
    """What the methods with and without a critic have in common."""

    temperature: float = 1.0
    """of sampling and of all log-probabilities"""
    old_logprobs: Literal["auto", "sampler", "recomputed"] = "auto"
    """log-probabilities that ratios are taken against: the sampler's, or recomputed as
    in training; auto recomputes where the two round differently, that is everywhere
    but in float32 on a CPU"""
    kl: KLOptions = dataclasses.field(default_factory=KLOptions)
    """KL to the reference"""
    scores: ScoreOptions = dataclasses.field(default_factory=ScoreOptions)
    """scores, and the token rewards made of them"""
    policy_loss: PolicyLossOptions = dataclasses.field(
        default_factory=PolicyLossOptions
    )
    """loss of the policy"""
    epochs: int
    """passes over each rollout"""
    minibatches: int
    """optimizer steps per pass"""
    max_update_kl: float | None = None
    """early stop: end an update once the policy is this many nats per token from the
    one that answered; learning rates fall with the steps that are taken; None: never"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "must be above 0: learning needs responses that differ",
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
            "has nothing to stop: an update is one step, epochs=1 × minibatches=1",
        )
        check(
            self.policy_loss.sampler_correction == "none"
            or self.old_logprobs != "sampler",
            "policy-loss.sampler-correction",
            self.policy_loss.sampler_correction,
            "needs old-logprobs=recomputed: the sampler's own need no correction",
        )
        self.kl.validate("kl")
        self.policy_loss.validate("policy-loss")

    @property
    def learns_on_policy(self) -> bool:
        """Whether every gradient is of the policy that wrote the responses."""
        return self.epochs * self.minibatches == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(RewardSources, RunConfig):
    """What PPO and its relatives without a critic have in common."""

    policy: str
    """Hugging Face directory of the policy to improve, usually the supervised model"""
    data: str
    """prompts: rows with a prompt, or any of the forms the other commands read; reward
    functions get the other columns"""
    reference: str | None = None
    """Hugging Face directory of the frozen reference; without it, the policy's start"""
    eval_data: str | None = None
    """held-out prompts; without it, eval-fraction of the prompts are held out"""
    eval_fraction: float = 0.05
    """share of prompts held out when there is no eval-data"""
    eval_prompts: int = 64
    """held-out prompts answered at each evaluation"""
    prompt_column: str = "prompt"
    """column of prompts"""
    unusable_prompts: Literal["fail", "drop"] = "fail"
    """what happens to blank prompts, and to conversations that spell special tokens or
    that the chat template refuses"""
    updates: int = 100
    """updates: one rollout and one round of epochs each"""
    batch_size: int = 64
    """answers per update"""
    microbatches: int = 1
    """parts of a minibatch computed one after the other, to save memory; they change
    what is learned only under policy-loss.mean-of-means"""
    max_prompt_tokens: int = 64
    """longest prompt, in tokens"""
    overlong: Overlong = "drop"
    """what happens to longer prompts; truncate keeps their end"""
    max_new_tokens: int = 48
    """longest answer, in tokens"""
    stop: tuple[str, ...] = ()
    """texts of single tokens that end an answer, besides the model's EOS; the
    reward model reads the score at whichever came"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        RunConfig.validate(self)
        check(
            self.lora.dropout == 0,
            "lora.dropout",
            self.lora.dropout,
            "must be 0 here: with it the policy that answered and the one that learns "
            "are two networks, whose ratio is not 1 at the first step",
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
            "must lie in (0, 1) when there is no eval-data",
        )

    def _check_method(self, method: PolicyMethod) -> None:
        """What depends on both the method and the sizes."""
        measured = self._held_out_metrics(method)
        check(
            self.early_stop is None or self.early_stop in measured,
            "early-stop",
            self.early_stop,
            f"the held-out metrics of this run are {', '.join(measured)}",
        )
        devices = self.mesh.data * self.mesh.fsdp
        parts = method.minibatches * self.microbatches * devices
        check(
            self.batch_size % parts == 0,
            "batch-size",
            self.batch_size,
            f"must be a multiple of {parts} = minibatches {method.minibatches} × "
            f"microbatches {self.microbatches} × devices {devices}",
        )
        buffer = method.scores.overlong_buffer
        check(
            buffer is None or buffer <= self.max_new_tokens,
            "scores.overlong-buffer",
            buffer,
            f"must be at most max-new-tokens={self.max_new_tokens}",
        )
        check(
            self.reference is None or method.kl.place != "none",
            "reference",
            self.reference,
            "is not used under kl.place=none",
        )

    def _held_out_metrics(self, method: PolicyMethod) -> list[str]:
        """What `HeldOut` measures."""
        names = ["score_mean", "score_std", "length_mean", "stop_rate"]
        if method.kl.place != "none":
            names.append("kl_sequence")
        functions = [*self.eval_reward, *self.reward]
        names += [f"reward/{function_name(spec)}" for spec in functions]
        if functions and self.eval_pass is not None:
            powers = range(self.eval_samples.bit_length())
            names += [f"pass_at_{2**power}" for power in powers]
        return [f"eval/{name}" for name in names]
