"""The configurations of the commands beside the training stages.

The string below each field is its help on the command line.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.algo.temperature import SMALLEST_TO_LEARN, check_temperature
from rlhf_jax.config.policy import function_name
from rlhf_jax.config.run import Dtype, check_positive
from rlhf_jax.data.annotation import LETTERS, Kind
from rlhf_jax.data.judgements import RatingScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Answers of a model to prompts, printed or written as JSON lines."""

    model: str
    """Hugging Face directory of a language model"""
    prompt: tuple[str, ...] = ()
    """one or more prompts"""
    chat: bool = False
    """each prompt is a user's message, put into the model's chat template"""
    system: str | None = None
    """system message before each prompt, for chat"""
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
    """texts of single tokens that end an answer, besides the model's EOS"""
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
            not self.chat or self.data is None,
            "chat",
            self.chat,
            "is for prompt; rows of data may hold chat messages themselves",
        )
        check(
            self.system is None or self.chat,
            "system",
            self.system,
            "is for chat; add chat, or begin the prompt with it",
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
        check_temperature(self.temperature, greedy=True)
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
    of a reward model; prompts give rewards, pass rates, KL, length and stop rate of a
    policy.
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
    reward: tuple[str, ...] = ()
    """reward functions for answers to prompts, as for rlhf-jax grpo: file.py:function
    or package.module:function"""
    reward_columns: tuple[str, ...] = ()
    """columns that reward functions get, which every row must have; without them, those
    that the first row has and that are not null there"""
    reward_time_limit: float = 5.0
    """seconds after which a call of a reward function has failed"""
    samples: int = 1
    """answers per prompt"""
    pass_score: float | None = 1.0
    """an answer passes with at least this score by the first reward function; None:
    pass rates are left out"""
    temperature: float = 1.0
    """of sampling; 0 takes the likeliest token"""
    stop: tuple[str, ...] = ()
    """texts of single tokens that end an answer, besides the model's EOS"""
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
            not self.reward or self.prompts is not None,
            "reward",
            self.reward,
            "judges answers to prompts; give --prompts FILE",
        )
        check(
            self.samples == 1 or self.prompts is not None,
            "samples",
            self.samples,
            "are answers to prompts; give --prompts FILE",
        )
        for name in ("reward_columns", "reward_time_limit", "pass_score"):
            value = vars(self)[name]
            check(
                bool(self.reward) or value == vars(type(self))[name],
                name.replace("_", "-"),
                value,
                "is for reward functions; name some with reward",
            )
        check(
            self.reward_time_limit > 0,
            "reward-time-limit",
            self.reward_time_limit,
            "must be above 0 seconds",
        )
        names = [function_name(spec) for spec in self.reward]
        check(
            len(set(names)) == len(names),
            "reward",
            self.reward,
            "two functions of one name; figures are called by it, so rename one",
        )
        check(
            self.reference is None or self.prompts is not None,
            "reference",
            self.reference,
            "is what the KL of answers is measured against; give --prompts FILE",
        )
        check_temperature(self.temperature, greedy=True)
        check(
            self.reference is None or self.temperature >= SMALLEST_TO_LEARN,
            "temperature",
            self.temperature,
            f"is too low for a KL to a reference, which takes {SMALLEST_TO_LEARN:g} or "
            "more; leave out --reference, or sample at --temperature 1",
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
            samples=self.samples,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """An adapter and its base model as one Hugging Face directory."""

    adapter: str
    """directory of an adapter in PEFT's format, such as adapter/ of a run"""
    output: str
    """directory to write"""
    model: str | None = None
    """Hugging Face directory of the base model; without it, the one that the adapter
    names"""
    dtype: Dtype = "float32"
    """of the tensors that are written; merging is in float32"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetsConfig:
    """The presets of ppo or grpo: a table of every option, or one as a file."""

    command: Literal["ppo", "grpo"] | None = None
    """whose presets; without it, the table of ppo, or a preset of either"""
    preset: str | None = None
    """print this one as YAML that --config reads; without it, the table of all"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateWriteConfig(GenerateConfig):
    """Samples of a model as a file in which a person ranks or rates them.

    Beside the file lies its key, with the texts and which answer is which: keep it.
    """

    output: str = "annotations.csv"
    """file to write: .csv for spreadsheets, or .jsonl; must not exist"""
    samples: int = 4
    """answers per prompt; equal ones are shown once"""
    kind: Kind = "ranking"
    """whether the answers to a prompt are put in order, or rated one by one"""
    scale: RatingScale = dataclasses.field(default_factory=RatingScale)
    """ratings"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        check(
            not self.chat,
            "chat",
            self.chat,
            "would show people another prompt than the model reads; give chat messages "
            "as data",
        )
        check(
            self.kind == "rating" or self.scale == RatingScale(),
            "scale",
            self.scale,
            "does nothing under kind=ranking; leave it out",
        )
        least = 2 if self.kind == "ranking" else 1
        check(
            least <= self.samples <= len(LETTERS),
            "samples",
            self.samples,
            f"must be from {least} to {len(LETTERS)} under kind={self.kind}",
        )
        check(
            self.temperature > 0 or self.samples == 1,
            "temperature",
            self.temperature,
            "gives equal answers to a prompt; must be above 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateReadConfig:
    """Filled-in files as judgements, with a report of what they say.

    Each file is one person's. Contradictions and repeated judgements are counted and
    kept: `rlhf-jax reward --feedback judgements` decides what becomes of them.
    """

    files: tuple[str, ...]
    """files that came back, one of each person"""
    key: str | None = None
    """key of all files; without it, each has its own beside it"""
    on_unfilled: Literal["fail", "drop"] = "fail"
    """what happens to rows that are not filled in"""
    output: str | None = None
    """.jsonl file to write the judgements to; without it they are only reported"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(bool(self.files), "files", self.files, "name at least one file")
        if self.output is None:
            return
        check(
            Path(self.output).suffix == ".jsonl",
            "output",
            self.output,
            "the name must end in .jsonl",
        )
        check(
            Path(self.output).resolve() not in [Path(f).resolve() for f in self.files],
            "output",
            self.output,
            "is one of files, which it would overwrite; choose another name",
        )
