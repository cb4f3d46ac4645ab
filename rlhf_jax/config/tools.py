"""The options of the other commands.

The string below each field is its command-line help.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.algo.options import check, require_defaults
from rlhf_jax.algo.temperature import SMALLEST_TO_LEARN, check_temperature
from rlhf_jax.config.limits import check_numbers
from rlhf_jax.config.reward_limits import check_call_limits
from rlhf_jax.config.reward_sources import function_name
from rlhf_jax.config.run import Dtype, check_positive
from rlhf_jax.data.annotation import LETTERS, Kind
from rlhf_jax.data.judgements import RatingScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Sample responses to prompts; print them or write them as JSON lines."""

    model: str
    """Hugging Face directory of a language model"""
    prompt: tuple[str, ...] = ()
    """one or more prompts"""
    chat: bool = False
    """format each prompt as a user message with the model's chat template"""
    system: str | None = None
    """system message before each prompt, with chat"""
    data: str | None = None
    """file of prompts, instead of prompt"""
    prompt_column: str = "prompt"
    """column of prompts in the file"""
    limit: int | None = None
    """use only the first N prompts of the file"""
    output: str | None = None
    """file to write responses to, one JSON line each; None: print them"""
    samples: int = 1
    """responses per prompt"""
    batch_size: int = 32
    """responses sampled at a time"""
    max_new_tokens: int = 64
    """maximum response length, in tokens"""
    temperature: float = 1.0
    """sampling temperature; 0: greedy decoding"""
    top_k: int | None = None
    """sample from the k most likely tokens"""
    top_p: float | None = None
    """sample from the smallest set of most likely tokens with this total probability"""
    min_p: float | None = None
    """sample from tokens at least this fraction as likely as the most likely token"""
    stop: tuple[str, ...] = ()
    """stop tokens, as text, besides the model's EOS"""
    dtype: Dtype = "float32"
    """dtype of parameters and activations"""
    seed: int = 0
    """seed of sampling, from 0 to 2^64 − 1"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self)
        check(
            bool(self.prompt) != bool(self.data),
            "prompt",
            self.prompt,
            "set either prompt or data",
        )
        check(
            not self.chat or self.data is None,
            "chat",
            self.chat,
            "cannot be combined with data, whose rows may contain chat messages",
        )
        check(
            self.system is None or self.chat,
            "system",
            self.system,
            "requires --chat; add it, or put this text at the start of the prompt",
        )
        check(
            self.limit is None or (self.limit >= 1 and self.data is not None),
            "limit",
            self.limit,
            "must be at least 1, and requires --data",
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
            check(allowed, flag, value, "must be in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out metrics of a language model, policy or reward model.

    Texts (data) give the loss and perplexity of a language model; pairs the accuracy of
    a reward model; prompts the rewards, pass rates, KL, length and stop rate of a
    policy.
    """

    model: str | None = None
    """Hugging Face directory of the language model or policy"""
    reward_model: str | None = None
    """Hugging Face directory of the reward model"""
    reference: str | None = None
    """Hugging Face directory of the reference for the policy's KL"""
    data: str | None = None
    """held-out texts"""
    pairs: str | None = None
    """held-out preference pairs"""
    prompts: str | None = None
    """held-out prompts"""
    prompt_column: str = "prompt"
    """column of prompts"""
    completion_column: str | None = None
    """column of responses; None: completion or response"""
    limit: int | None = None
    """read only the first N rows"""
    unusable_pairs: Literal["fail", "drop"] = "fail"
    """how to handle pairs of equal responses or without a common prefix"""
    batch_size: int = 32
    """rows per batch"""
    max_tokens: int = 256
    """maximum sequence length, in tokens; longer rows are dropped and counted"""
    max_new_tokens: int = 64
    """maximum response length, in tokens"""
    reward: tuple[str, ...] = ()
    """reward functions for responses to prompts, as for rlhf-jax grpo: file.py:function
    or package.module:function"""
    reward_columns: tuple[str, ...] = ()
    """columns passed to reward functions, required in every row; empty: those that are
    not null in the first row"""
    reward_time_limit: float = 5.0
    """seconds before a reward function call fails"""
    reward_memory_limit: float | None = None
    """GiB of address space before a reward function call fails, per process and with
    libraries; None: no limit"""
    samples: int = 1
    """responses per prompt"""
    pass_score: float | None = 1.0
    """lowest score at which a response passes, by the first reward function; None: no
    pass rates"""
    temperature: float = 1.0
    """sampling temperature; 0: greedy decoding"""
    stop: tuple[str, ...] = ()
    """stop tokens, as text, besides the model's EOS"""
    dtype: Dtype = "float32"
    """dtype of parameters and activations"""
    output: str | None = None
    """JSON file to write the metrics to"""
    seed: int = 0
    """seed of sampling, from 0 to 2^64 − 1"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self)
        given = [f for f in (self.data, self.pairs, self.prompts) if f is not None]
        check(
            len(given) >= 1,
            "data",
            None,
            "nothing to evaluate on; set data (texts), pairs or prompts",
        )
        if self.data is not None or self.prompts is not None:
            check(self.model is not None, "model", None, "required by data and prompts")
        if self.pairs is not None:
            check(
                self.reward_model is not None, "reward-model", None, "required by pairs"
            )
        check(
            not self.reward or self.prompts is not None,
            "reward",
            self.reward,
            "requires --prompts FILE",
        )
        check(
            self.samples == 1 or self.prompts is not None,
            "samples",
            self.samples,
            "requires --prompts FILE",
        )
        of_functions = ("reward_columns", "reward_time_limit", "reward_memory_limit")
        for name in (*of_functions, "pass_score"):
            value = vars(self)[name]
            check(
                bool(self.reward) or value == vars(type(self))[name],
                name.replace("_", "-"),
                value,
                "requires --reward",
            )
        check_call_limits(self.reward_time_limit, self.reward_memory_limit)
        names = [function_name(spec) for spec in self.reward]
        check(
            len(set(names)) == len(names),
            "reward",
            self.reward,
            "two functions have this name, which metrics use; rename one",
        )
        check(
            self.reference is None or self.prompts is not None,
            "reference",
            self.reference,
            "requires --prompts FILE",
        )
        check_temperature(self.temperature, greedy=True)
        check(
            self.reference is None or self.temperature >= SMALLEST_TO_LEARN,
            "temperature",
            self.temperature,
            f"is too low for a KL to the reference, must be at least "
            f"{SMALLEST_TO_LEARN:g}; remove --reference or use --temperature 1",
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
    """Merge an adapter and its base model into one Hugging Face directory."""

    adapter: str
    """directory of a PEFT adapter, such as adapter/ of a run"""
    output: str
    """directory to write"""
    model: str | None = None
    """Hugging Face directory of the base model; None: as named in the adapter"""
    dtype: Dtype = "float32"
    """dtype of the written tensors; merging is in float32"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresetsConfig:
    """Presets of ppo or grpo: a table of all options, or one preset as YAML."""

    command: Literal["ppo", "grpo"] | None = None
    """command whose presets to show; None: the table of ppo, or a preset of either"""
    preset: str | None = None
    """preset to print as YAML for --config; None: the table of all"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateWriteConfig(GenerateConfig):
    """Sample responses and write a file for a person to rank or rate them.

    Keep the key file next to it: it has the texts and maps responses to labels.
    """

    output: str = "annotations.csv"
    """file to write: .csv for spreadsheets, or .jsonl; must not exist"""
    samples: int = 4
    """responses per prompt; duplicates are shown once"""
    kind: Kind = "ranking"
    """rank the responses to each prompt, or rate them individually"""
    scale: RatingScale = dataclasses.field(default_factory=RatingScale)
    """rating scale"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        check(
            not self.chat,
            "chat",
            self.chat,
            "would show annotators a different prompt than the model reads; pass chat "
            "messages with --data",
        )
        if self.kind == "ranking":
            require_defaults(self, "", "scale", why="has no effect with kind=ranking")
        least = 2 if self.kind == "ranking" else 1
        check(
            least <= self.samples <= len(LETTERS),
            "samples",
            self.samples,
            f"must be from {least} to {len(LETTERS)} with kind={self.kind}",
        )
        check(
            self.temperature > 0 or self.samples == 1,
            "temperature",
            self.temperature,
            "makes all responses to a prompt equal; must be above 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateReadConfig:
    """Read completed annotation files as judgments, and report on them.

    Each file is by one person. Contradictory and repeated judgments are counted and
    kept; `rlhf-jax reward --feedback judgements` handles them.
    """

    files: tuple[str, ...]
    """completed files, one per person"""
    key: str | None = None
    """key of all files; None: each file has its own key next to it"""
    on_unfilled: Literal["fail", "drop"] = "fail"
    """how to handle incomplete rows"""
    output: str | None = None
    """.jsonl file to write the judgments to; None: only report"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(bool(self.files), "files", self.files, "name at least one file")
        if self.output is None:
            return
        check(
            Path(self.output).suffix == ".jsonl",
            "output",
            self.output,
            "must end in .jsonl",
        )
        check(
            Path(self.output).resolve() not in [Path(f).resolve() for f in self.files],
            "output",
            self.output,
            "would overwrite an input file; choose another name",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Run a single step of a run again, one with a NaN or infinite loss or gradient.

    From its batch, which the run saved, and the checkpoint before it. Prints losses and
    gradient norms of each optimizer step, and the rows with values that are not finite.
    Neither data nor reward functions are needed; the run is not changed.
    """

    run_dir: str
    """directory of the run"""
    step: int | None = None
    """the step; None: the last one that was saved in nonfinite/"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self)
        if self.step is not None:
            check_positive(step=self.step)
