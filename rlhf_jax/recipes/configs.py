"""The configuration of every command: its flags, the keys of its file, its help.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.presets import PPOMethod
from rlhf_jax.runtime.config import (
    Dtype,
    FreshModelConfig,
    OptimizerConfig,
    Overlong,
    RunConfig,
    check_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning: a language model learns to imitate texts or answers."""

    data: str
    """training texts: .jsonl, .jsonl.gz, .parquet or .txt; rows with text,
    prompt/completion or chat messages"""
    eval_data: str | None = None
    """held-out texts; without it, eval-fraction of the training rows are held out"""
    eval_fraction: float = 0.05
    """share of training rows held out when there is no eval-data"""
    model: str | None = None
    """Hugging Face directory to start from; without it a fresh model is built"""
    fresh: FreshModelConfig = dataclasses.field(default_factory=FreshModelConfig)
    """shape of the fresh model"""
    prompt_column: str = "prompt"
    """column of prompts"""
    completion_column: str | None = None
    """column of answers; without it, completion or response"""
    unusable_rows: Literal["fail", "drop"] = "fail"
    """what happens to rows with a blank prompt, answer or text"""
    steps: int = 500
    """optimizer steps"""
    batch_size: int = 32
    """sequences per step"""
    microbatches: int = 1
    """parts of a batch computed one after the other, to save memory"""
    max_tokens: int = 256
    """longest sequence, prompt and answer together, in tokens"""
    overlong: Overlong = "drop"
    """what happens to longer sequences"""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """optimizer"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        _check_supervised(self)
        self.fresh.validate("fresh")
        check(
            self.model is None or self.fresh == FreshModelConfig(),
            "model",
            self.model,
            "brings its own shape; leave out the fresh options, or the model",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Reward model: learns from preference pairs which answer people like better."""

    data: str
    """preference pairs: rows with prompt, chosen, rejected, or two whole dialogues
    chosen, rejected with a common beginning"""
    model: str
    """Hugging Face directory to start from, usually the supervised model"""
    eval_data: str | None = None
    """held-out pairs; without it, eval-fraction of the training rows are held out"""
    eval_fraction: float = 0.1
    """share of training rows held out when there is no eval-data"""
    unusable_pairs: Literal["fail", "drop"] = "fail"
    """what happens to pairs of equal answers or without a common beginning"""
    steps: int = 300
    """optimizer steps"""
    batch_size: int = 32
    """pairs per step"""
    microbatches: int = 1
    """parts of a batch computed one after the other, to save memory"""
    max_tokens: int = 256
    """longest sequence, prompt and answer together, in tokens"""
    overlong: Overlong = "drop"
    """what happens to pairs with a longer sequence"""
    label_smoothing: float = 0.0
    """assumed probability that a judgement is flipped"""
    center_coef: float = 0.01
    """weight of the term that keeps scores near 0"""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4)
    )
    """optimizer"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        _check_supervised(self)
        check(
            0 <= self.label_smoothing < 0.5,
            "label-smoothing",
            self.label_smoothing,
            "must lie in [0, 0.5)",
        )
        check(
            self.center_coef >= 0,
            "center-coef",
            self.center_coef,
            "must not be negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(PPOMethod, RunConfig):
    """PPO against a reward model, from a supervised model and a reward model.

    --preset NAME takes every option of the method from a known implementation:
    openai_2019, nplus_tldr, trl, openrlhf, verl or deepspeed_chat. Options given beside
    it, or in the file, go before.
    """

    policy: str
    """Hugging Face directory of the policy to improve, usually the supervised model"""
    reward_model: str
    """Hugging Face directory of the frozen reward model"""
    data: str
    """prompts: rows with a prompt, or any of the forms the other commands read"""
    critic: str | None = None
    """Hugging Face directory the critic starts from; without it, the reward model"""
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
    updates: int = 100
    """PPO updates: one rollout and one round of epochs each"""
    batch_size: int = 64
    """prompts answered per update"""
    microbatches: int = 1
    """parts of a minibatch computed one after the other, to save memory"""
    max_prompt_tokens: int = 64
    """longest prompt, in tokens"""
    overlong: Overlong = "drop"
    """what happens to longer prompts; truncate keeps their end"""
    max_new_tokens: int = 48
    """longest answer, in tokens"""
    stop: tuple[str, ...] = ()
    """texts of single tokens that end an answer, besides the tokenizer's EOS; the
    reward model reads the score at whichever came"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        RunConfig.validate(self)
        PPOMethod.validate(self)
        check_positive(
            updates=self.updates,
            batch_size=self.batch_size,
            microbatches=self.microbatches,
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            eval_prompts=self.eval_prompts,
        )
        parts = self.minibatches * self.microbatches * self.mesh.data * self.mesh.fsdp
        check(
            self.batch_size % parts == 0,
            "batch-size",
            self.batch_size,
            f"must be a multiple of {parts} = minibatches {self.minibatches} × "
            f"microbatches {self.microbatches} × devices "
            f"{self.mesh.data * self.mesh.fsdp}",
        )
        _check_fraction(self)
        check(
            self.critic is None or self.critic_trunk == "own",
            "critic",
            self.critic,
            "is not used under critic-trunk=shared",
        )
        check(
            self.reference is None or self.kl.place != "none",
            "reference",
            self.reference,
            "is not used under kl.place=none",
        )
        check(
            self.scores.normalization != "reference" or self.kl.place != "none",
            "scores.normalization",
            self.scores.normalization,
            "needs a reference; take running, or another kl.place than none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answers of a model to prompts, printed or written as JSON lines."""

    model: str
    """Hugging Face directory of a language model"""
    prompt: tuple[str, ...] = ()
    """one or more prompts"""
    data: str | None = None
    """file of prompts, instead of prompt"""
    prompt_column: str = "prompt"
    """column of prompts in the file"""
    limit: int | None = None
    """answer only the first so many prompts of the file"""
    output: str | None = None
    """file to write one JSON line per answer to; without it answers are printed"""
    samples: int = 1
    """answers per prompt"""
    batch_size: int = 32
    """answers sampled at a time"""
    max_new_tokens: int = 64
    """longest answer, in tokens"""
    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_k: int | None = None
    """sample among the k likeliest tokens"""
    top_p: float | None = None
    """sample among the fewest tokens that hold this probability"""
    min_p: float | None = None
    """sample among tokens at least this fraction as probable as the likeliest"""
    stop: tuple[str, ...] = ()
    """texts of single tokens that end an answer, besides the tokenizer's EOS"""
    dtype: Dtype = "float32"
    """of parameters and activations"""
    seed: int = 0
    """of the sampling"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            bool(self.prompt) != bool(self.data),
            "prompt",
            self.prompt,
            "give either prompt or data",
        )
        check(
            self.limit is None or (self.limit >= 1 and self.data is not None),
            "limit",
            self.limit,
            "must be at least 1, and is for prompts from data",
        )
        check_positive(
            samples=self.samples,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        check(
            self.temperature >= 0,
            "temperature",
            self.temperature,
            "must not be negative; 0 takes the likeliest token",
        )
        check(
            self.top_k is None or self.top_k >= 1,
            "top-k",
            self.top_k,
            "must be at least 1",
        )
        for flag, value in (("top-p", self.top_p), ("min-p", self.min_p)):
            allowed = value is None or 0 < value <= 1
            check(allowed, flag, value, "must lie in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out figures of a model: a language model, a policy or a reward model.

    Texts (data) give loss and perplexity of a language model; pairs give the accuracy
    of a reward model; prompts give reward, KL, length and stop rate of a policy.
    """

    model: str | None = None
    """Hugging Face directory of the language model or policy"""
    reward_model: str | None = None
    """Hugging Face directory of the reward model"""
    reference: str | None = None
    """Hugging Face directory the policy's KL is measured against"""
    data: str | None = None
    """held-out texts"""
    pairs: str | None = None
    """held-out preference pairs"""
    prompts: str | None = None
    """held-out prompts"""
    prompt_column: str = "prompt"
    """column of prompts"""
    completion_column: str | None = None
    """column of answers; without it, completion or response"""
    limit: int | None = None
    """read only the first so many rows"""
    unusable_pairs: Literal["fail", "drop"] = "fail"
    """what happens to pairs of equal answers or without a common beginning"""
    batch_size: int = 32
    """rows at a time"""
    max_tokens: int = 256
    """longest sequence, in tokens; longer rows are dropped and counted"""
    max_new_tokens: int = 64
    """longest answer, in tokens"""
    temperature: float = 1.0
    """of sampling"""
    stop: tuple[str, ...] = ()
    """texts of single tokens that end an answer, besides the tokenizer's EOS"""
    dtype: Dtype = "float32"
    """of parameters and activations"""
    output: str | None = None
    """file to write the figures to, as JSON"""
    seed: int = 0
    """of the sampling"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        given = [f for f in (self.data, self.pairs, self.prompts) if f is not None]
        check(
            len(given) >= 1,
            "data",
            None,
            "name what to evaluate on: data (texts), pairs or prompts",
        )
        if self.data is not None or self.prompts is not None:
            check(self.model is not None, "model", None, "needed for data and prompts")
        if self.pairs is not None:
            check(
                self.reward_model is not None, "reward-model", None, "needed for pairs"
            )
        check(
            self.reference is None or self.prompts is not None,
            "reference",
            self.reference,
            "is what the KL of answers to prompts is measured against; give prompts",
        )
        check(
            self.limit is None or self.limit >= 1,
            "limit",
            self.limit,
            "must be at least 1",
        )
        check_positive(
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            max_new_tokens=self.max_new_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """All three stages on short reviews, from nothing, in minutes on a laptop."""

    run_dir: str = "runs/quickstart"
    """directory for the three runs, the table and the summary"""
    seed: int = 0
    """all randomness follows from it"""
    quiet: bool = False
    """print only the final table"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetsConfig:
    """The presets of PPO: a table of every option, or one of them as a file."""

    preset: str | None = None
    """print this one as YAML that --config reads; without it, the table of all"""

    def validate(self) -> None:
        """Nothing to check: the name is looked up where it is used."""


def _check_supervised(config: SFTConfig | RewardConfig) -> None:
    check_positive(
        steps=config.steps,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        max_tokens=config.max_tokens,
    )
    devices = config.mesh.data * config.mesh.fsdp
    parts = config.microbatches * devices
    check(
        config.batch_size % parts == 0,
        "batch-size",
        config.batch_size,
        f"must be a multiple of {parts} = microbatches {config.microbatches} × devices "
        f"{devices}",
    )
    _check_fraction(config)
    config.optimizer.validate("optimizer")


def _check_fraction(config: SFTConfig | RewardConfig | PPOConfig) -> None:
    check(
        config.eval_data is not None or 0 < config.eval_fraction < 1,
        "eval-fraction",
        config.eval_fraction,
        "must lie in (0, 1) when there is no eval-data",
    )
