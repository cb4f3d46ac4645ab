"""The options of `rlhf-jax sft` and `rlhf-jax reward`.

The string below each field is its command-line help.
"""

import dataclasses
import math
from typing import ClassVar, Literal

from rlhf_jax.algo.options import check, require_defaults
from rlhf_jax.config.limits import check_batch
from rlhf_jax.config.run import (
    FreshModelConfig,
    OptimizerConfig,
    RunConfig,
    check_positive,
)
from rlhf_jax.data.comparisons import OnContradiction
from rlhf_jax.data.encoding import Overlong
from rlhf_jax.data.judgements import RatingScale
from rlhf_jax.data.row_forms import TrainOn


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """Options shared by SFT and reward modeling."""

    data: str
    """training data"""
    model: str | None
    """Hugging Face directory of the initial model"""
    eval_data: str | None = None
    """held-out data; None: hold out eval-fraction of the training data"""
    eval_fraction: float = 0.05
    """share of the data held out if there is no eval-data"""
    steps: int = 500
    """optimizer steps"""
    batch_size: int = 32
    """rows per step"""
    microbatches: int = 1
    """gradient accumulation steps per batch, to save memory"""
    max_tokens: int = 256
    """maximum sequence length, prompt plus response, in tokens"""
    overlong: Overlong = "drop"
    """how to handle longer sequences"""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """optimizer"""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate by flag, without the dashes."""
        return {"optimizer.learning-rate": self.optimizer.learning_rate}

    def input_files(self) -> dict[str, str | None]:
        """Option → file that the run reads; unchanged when a run resumes."""
        return {"data": self.data, "eval-data": self.eval_data}

    def tokenizer_source(self) -> str | None:
        """The checkpoint with the tokenizer and chat template of the run."""
        return self.model

    def unsaved_models(self) -> dict[str, str | None]:
        """The base model of adapters: checkpoints contain only the adapters."""
        return {"model": self.model if self.lora.is_on else None}

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        check_positive(
            steps=self.steps,
            batch_size=self.batch_size,
            microbatches=self.microbatches,
            max_tokens=self.max_tokens,
        )
        check_batch(self.batch_size, self.max_tokens, columns="max-tokens")
        devices = self.mesh.data * self.mesh.fsdp
        parts = self.microbatches * devices
        check(
            self.batch_size % parts == 0,
            "batch-size",
            self.batch_size,
            f"must be a multiple of {parts} = microbatches {self.microbatches} × "
            f"devices {devices}",
        )
        check(
            self.eval_data is not None or 0 < self.eval_fraction < 1,
            "eval-fraction",
            self.eval_fraction,
            "must be in (0, 1) without eval-data",
        )
        self.optimizer.validate("optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning of a language model on texts or responses."""

    stage: ClassVar[str] = "sft"

    data: str
    """training texts: .jsonl, .jsonl.gz, .parquet or .txt; rows with text,
    prompt/completion or chat messages"""
    eval_data: str | None = None
    """held-out texts; None: hold out eval-fraction of the training rows"""
    model: str | None = None
    """Hugging Face directory of the initial model; None: train from scratch"""
    fresh: FreshModelConfig = dataclasses.field(default_factory=FreshModelConfig)
    """shape of a model trained from scratch"""
    prompt_column: str = "prompt"
    """column of prompts"""
    completion_column: str | None = None
    """column of responses; None: completion or response"""
    unusable_rows: Literal["fail", "drop"] = "fail"
    """how to handle rows with a blank prompt, response or text, and conversations that
    contain special tokens as text or that the chat template rejects"""
    train_on: TrainOn = "last-answer"
    """assistant turns of a conversation to train on, each with its end token"""
    chat_template: str | None = None
    """Jinja file that replaces the model's chat template; saved with the model"""
    batch_size: int = 32
    """sequences per step"""
    overlong: Overlong = "drop"
    """how to handle longer sequences; truncate cuts the start of the prompt, and does
    not train on assistant turns that are cut"""

    def input_files(self) -> dict[str, str | None]:
        """Option → file that the run reads; unchanged when a run resumes."""
        return super().input_files() | {"chat-template": self.chat_template}

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        self.fresh.validate("fresh")
        check(
            self.model is None or self.fresh == FreshModelConfig(),
            "model",
            self.model,
            "has its own shape; remove the fresh options or the model",
        )
        check(
            self.chat_template is None or self.model is not None,
            "chat-template",
            self.chat_template,
            "requires --model",
        )
        check(
            self.model is not None or not self.lora.is_on,
            "lora.rank",
            self.lora.rank,
            "requires a pretrained model; set --model",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(SupervisedConfig):
    """Reward model, trained on human preferences between responses."""

    stage: ClassVar[str] = "reward"

    data: str
    """preference pairs: rows with prompt, chosen, rejected, or with two full dialogues
    chosen, rejected that share a prefix; or see feedback"""
    model: str
    """Hugging Face directory of the initial model, usually the SFT model"""
    feedback: Literal["pairs", "judgements", "annotations"] = "pairs"
    """format of data and eval-data: pairs; judgments, which are rows with a rating,
    ratings or a ranking; or a completed file from `rlhf-jax annotate write`"""
    loss: Literal["bradley-terry", "pairwise-ranking", "plackett-luce"] = (
        "bradley-terry"
    )
    """loss on pairs; or on all responses to a prompt, each scored once: the mean over
    their pairs, or the likelihood of the ranking, which cannot contain ties"""
    scale: RatingScale = dataclasses.field(default_factory=RatingScale)
    """rating scale of judgments"""
    margin_step: float = 0.0
    """margin between scores per unit of rating or per rank"""
    on_contradiction: OnContradiction = "fail"
    """how to handle contradictory judgments"""
    on_unfilled: Literal["fail", "drop"] = "fail"
    """how to handle incomplete rows of annotations"""
    eval_data: str | None = None
    """held-out feedback; None: hold out eval-fraction of the prompts"""
    eval_fraction: float = 0.1
    """share of prompts held out if there is no eval-data"""
    unusable_pairs: Literal["fail", "drop"] = "fail"
    """how to handle pairs of equal responses or without a common prefix, judgments of
    blank prompts, and conversations that contain special tokens as text or that the
    chat template rejects"""
    steps: int = 300
    """optimizer steps"""
    batch_size: int = 32
    """pairs per step, or rankings if the loss is on all responses to a prompt"""
    overlong: Overlong = "drop"
    """how to handle pairs or rankings with a longer sequence"""
    label_smoothing: float = 0.0
    """assumed probability that a judgment is flipped"""
    center_coef: float = 0.01
    """weight of the regularizer that keeps scores near 0"""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4)
    )
    """optimizer"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        check(
            0 <= self.label_smoothing < 0.5,
            "label-smoothing",
            self.label_smoothing,
            "must be in [0, 0.5)",
        )
        check(
            self.center_coef >= 0,
            "center-coef",
            self.center_coef,
            "must not be negative",
        )
        check(
            0 <= self.margin_step < math.inf,
            "margin-step",
            self.margin_step,
            "must be finite and not negative",
        )
        check(
            self.loss == "bradley-terry" or self.feedback != "pairs",
            "loss",
            self.loss,
            "requires rankings; use feedback=judgements or annotations",
        )
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Raises ValueError for the first option that is set but has no effect."""
        unused = []
        if self.feedback == "pairs":
            unused += ["margin_step", "on_contradiction"]
        if self.feedback != "judgements":
            unused += ["scale"]
        unused += [
            "unusable_pairs" if self.feedback == "annotations" else "on_unfilled"
        ]
        why = f"has no effect with feedback={self.feedback}"
        require_defaults(self, "", *unused, why=why)
        if self.loss == "plackett-luce":
            why = f"has no effect with loss={self.loss}"
            require_defaults(self, "", "margin_step", "label_smoothing", why=why)
