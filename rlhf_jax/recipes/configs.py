"""The configurations of the training stages: flags, keys of the file, help.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.presets import PPOMethod
from rlhf_jax.runtime.config import (
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
    openai_2019, nplus_tldr, trl, openrlhf, verl or deepspeed_chat (`rlhf-jax presets`
    lists them). Options given beside it override it, and so does a file.
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
    """parts of a minibatch computed one after the other, to save memory; they change
    what is learned only under policy-loss.mean-of-means"""
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
            self.critic_warmup < self.updates,
            "critic-warmup",
            self.critic_warmup,
            f"must be below updates={self.updates}, or the policy never learns",
        )
        buffer = self.scores.overlong_buffer
        check(
            buffer is None or buffer <= self.max_new_tokens,
            "scores.overlong-buffer",
            buffer,
            f"must be at most max-new-tokens={self.max_new_tokens}",
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
