"""The configurations of the training stages: flags, keys of the file, help.

The string below each field is its help on the command line.
"""

import dataclasses
import math
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.config.run import (
    FreshModelConfig,
    OptimizerConfig,
    Overlong,
    RunConfig,
    check_positive,
)
from rlhf_jax.data.comparisons import OnContradiction
from rlhf_jax.data.judgements import RatingScale
from rlhf_jax.data.row_forms import TrainOn


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
    """what happens to rows with a blank prompt, answer or text, and to conversations
    that spell special tokens or that the chat template refuses"""
    train_on: TrainOn = "last-answer"
    """which answers of a conversation are learnt, each with the token that ends it"""
    chat_template: str | None = None
    """Jinja file that turns conversations into text, instead of the model's own; it is
    written with the model"""
    steps: int = 500
    """optimizer steps"""
    batch_size: int = 32
    """sequences per step"""
    microbatches: int = 1
    """parts of a batch computed one after the other, to save memory"""
    max_tokens: int = 256
    """longest sequence, prompt and answer together, in tokens"""
    overlong: Overlong = "drop"
    """what happens to longer sequences; truncate cuts the beginning of the prompt, and
    answers there that are no longer whole are not learnt"""
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
        check(
            self.chat_template is None or self.model is not None,
            "chat-template",
            self.chat_template,
            "is for the tokenizer of a model; name the model",
        )
        check(
            self.model is not None or not self.lora.is_on,
            "lora.rank",
            self.lora.rank,
            "adapts a model that has been trained; name it with model",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Reward model: learns from human judgements which answers people like better."""

    data: str
    """preference pairs: rows with prompt, chosen, rejected, or two whole dialogues
    chosen, rejected with a common beginning; or what feedback names"""
    model: str
    """Hugging Face directory to start from, usually the supervised model"""
    feedback: Literal["pairs", "judgements", "annotations"] = "pairs"
    """what data and eval-data hold: pairs; judgements, which are rows with a rating,
    ratings or a ranking; or a filled-in file of `rlhf-jax annotate write`"""
    loss: Literal["bradley-terry", "pairwise-ranking", "plackett-luce"] = (
        "bradley-terry"
    )
    """of pairs; or of all answers to a prompt at once, each scored once: the mean over
    their pairs, or the likelihood of the order, which knows no ties"""
    scale: RatingScale = dataclasses.field(default_factory=RatingScale)
    """ratings of judgements"""
    margin_step: float = 0.0
    """by how much scores should differ per unit of rating, or per place of a ranking"""
    on_contradiction: OnContradiction = "fail"
    """what happens to judgements that contradict each other"""
    on_unfilled: Literal["fail", "drop"] = "fail"
    """what happens to rows of annotations that are not filled in"""
    eval_data: str | None = None
    """held-out feedback; without it, eval-fraction of the prompts are held out"""
    eval_fraction: float = 0.1
    """share of prompts held out when there is no eval-data"""
    unusable_pairs: Literal["fail", "drop"] = "fail"
    """what happens to pairs of equal answers or without a common beginning, to
    judgements of blank prompts, and to conversations that spell special tokens or that
    the chat template refuses"""
    steps: int = 300
    """optimizer steps"""
    batch_size: int = 32
    """pairs per step; rankings, where the loss is of all answers to a prompt"""
    microbatches: int = 1
    """parts of a batch computed one after the other, to save memory"""
    max_tokens: int = 256
    """longest sequence, prompt and answer together, in tokens"""
    overlong: Overlong = "drop"
    """what happens to pairs or rankings with a longer sequence"""
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
        check(
            0 <= self.margin_step < math.inf,
            "margin-step",
            self.margin_step,
            "must be 0 or a positive number",
        )
        check(
            self.loss == "bradley-terry" or self.feedback != "pairs",
            "loss",
            self.loss,
            "is of whole rankings; give feedback=judgements or annotations",
        )
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Raises ValueError for the first option that is set but would do nothing."""
        feedback, loss = f"feedback={self.feedback}", f"loss={self.loss}"
        judged = self.feedback != "pairs"
        annotated = self.feedback == "annotations"
        likelihood = self.loss == "plackett-luce"
        given = self.feedback == "judgements"
        for flag, value, default, is_used, where in (
            ("scale", self.scale, RatingScale(), given, feedback),
            ("margin-step", self.margin_step, 0.0, judged, feedback),
            ("on-contradiction", self.on_contradiction, "fail", judged, feedback),
            ("on-unfilled", self.on_unfilled, "fail", annotated, feedback),
            ("unusable-pairs", self.unusable_pairs, "fail", not annotated, feedback),
            ("margin-step", self.margin_step, 0.0, not likelihood, loss),
            ("label-smoothing", self.label_smoothing, 0.0, not likelihood, loss),
        ):
            unused = f"does nothing under {where}; leave it out"
            check(is_used or value == default, flag, value, unused)


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


def _check_fraction(config: SFTConfig | RewardConfig) -> None:
    check(
        config.eval_data is not None or 0 < config.eval_fraction < 1,
        "eval-fraction",
        config.eval_fraction,
        "must lie in (0, 1) when there is no eval-data",
    )
