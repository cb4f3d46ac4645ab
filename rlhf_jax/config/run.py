"""Options shared by several commands.

The string below each field is its command-line help.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlhf_jax.algo.options import check, require_defaults
from rlhf_jax.config.adapters import LoraConfig
from rlhf_jax.config.limits import check_numbers

Dtype = Literal["float32", "bfloat16"]


def check_positive(prefix: str = "", **fields: int) -> None:
    """Raises ValueError naming the first field below 1."""
    for name, value in fields.items():
        flag = prefix + name.replace("_", "-")
        check(value >= 1, flag, value, "must be at least 1")


def check_unit(prefix: str = "", **fields: float) -> None:
    """Raises ValueError naming the first field outside [0, 1]."""
    for name, value in fields.items():
        flag = prefix + name.replace("_", "-")
        check(0 <= value <= 1, flag, value, "must be in [0, 1]")


MOST_PARAMETERS = 100_000_000_000
_MOST_FRESH = {
    "width": 2**16,
    "num_layers": 1000,
    "num_heads": 2**12,
    "max_positions": 2**22,
    "vocab_size": 2**22,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshModelConfig:
    """Shape of a model trained from scratch, if no checkpoint is given."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """architecture, also of the saved Hugging Face directory"""
    vocab_size: int = 1024
    """size of the byte-level BPE tokenizer that is trained on the data"""
    width: int = 128
    """size of the residual stream"""
    num_layers: int = 4
    """number of blocks"""
    num_heads: int = 4
    """attention heads; must divide width"""
    max_positions: int = 512
    """maximum sequence length of the model, in tokens"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        for field, most in _MOST_FRESH.items():
            value = getattr(self, field)
            flag = f"{name}.{field.replace('_', '-')}"
            check(1 <= value <= most, flag, value, f"must be from 1 to {most:,}")
        check(
            self.vocab_size >= 258,
            f"{name}.vocab-size",
            self.vocab_size,
            "must be at least 258, for 256 bytes and two special tokens",
        )
        parameters = self.width * (12 * self.num_layers * self.width + self.vocab_size)
        check(
            parameters <= MOST_PARAMETERS,
            f"{name}.width",
            self.width,
            f"with {name}.num-layers={self.num_layers} and {name}.vocab-size="
            f"{self.vocab_size} gives about {parameters:.1e} parameters; at most "
            f"{MOST_PARAMETERS:.1e} can be made from scratch",
        )
        check(
            self.width % self.num_heads == 0,
            f"{name}.width",
            self.width,
            f"must be a multiple of {name}.num-heads={self.num_heads}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-3
    """peak learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """decay after warm-up"""
    warmup_fraction: float = 0.05
    """share of optimizer steps with linear warm-up from 0"""
    end_fraction: float = 0.1
    """final learning rate as a share of the peak (linear, cosine)"""
    b1: float = 0.9
    """decay of the first moment"""
    b2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    form: Literal["torch", "tf1"] = "torch"
    """add eps to the bias-corrected root of the second moment, or to the uncorrected
    one, which damps the first steps"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    decay: Literal["matrices", "all"] = "matrices"
    """parameters that decay: kernels and embeddings, or also biases, norms and heads"""
    max_grad_norm: float = 1.0
    """global gradient norm to clip to; 0: no clipping"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            0 <= self.learning_rate < math.inf,
            f"{name}.learning-rate",
            self.learning_rate,
            "must be finite and not negative",
        )
        check_unit(
            f"{name}.",
            warmup_fraction=self.warmup_fraction,
            end_fraction=self.end_fraction,
        )
        check(self.eps > 0, f"{name}.eps", self.eps, "must be above 0")
        check(
            self.weight_decay >= 0,
            f"{name}.weight-decay",
            self.weight_decay,
            "must not be negative",
        )
        if self.weight_decay == 0:
            why = f"has no effect without {name}.weight-decay"
            require_defaults(self, name, "decay", why=why)
        check(
            self.max_grad_norm >= 0,
            f"{name}.max-grad-norm",
            self.max_grad_norm,
            "must be above 0, or 0 for no clipping",
        )
        check(0 <= self.b1 < 1, f"{name}.b1", self.b1, "must be in [0, 1)")
        check(0 <= self.b2 < 1, f"{name}.b2", self.b2, "must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh."""

    data: int = 1
    """data-parallel groups of devices; the batch is split over them"""
    fsdp: int = 1
    """devices per group; batch, parameters and optimizer state are sharded over them"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(self.data >= 1, f"{name}.data", self.data, "must be at least 1")
        check(self.fsdp >= 1, f"{name}.fsdp", self.fsdp, "must be at least 1")


Changed = Literal[
    "data", "eval-data", "chat-template", "tokenizer", "weights", "history"
]
"""What a resumed run may be told to accept."""

FREE_ON_RESUME = (
    # No effect on training.
    "run_dir",
    "tensorboard",
    "wandb",
    "checkpoint_every",
    "checkpoint_keep",
    "checkpoint_keep_every",
    "checkpoint_keep_highest",
    "checkpoint_keep_lowest",
    "eval_every",
    "mesh",
    # To change after a loss that was not finite.
    "optimizer.learning_rate",
    "actor_optimizer.learning_rate",
    "critic_optimizer.learning_rate",
    "on_nonfinite",
    "max_skipped",
    "undo_updates",
    # To change after a reward function has failed.
    "reward_processes",
    "reward_time_limit",
    "reward_memory_limit",
    "reward_on_failure",
    # Affect memory and time, and training only by rounding.
    "remat",
    "scan_layers",
    # Only affects the final output.
    "lora.merge",
)
"""Options that a resumed run may change; a section includes all its options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of every training run."""

    stage: ClassVar[str]
    """the command that trains"""

    run_dir: str
    """directory of this run: configuration, metrics, checkpoints, model, report"""
    resume: bool = False
    """resume from the latest checkpoint in the run directory"""
    resume_step: int | None = None
    """with resume: resume from the checkpoint of this step instead; later checkpoints
    and logs are removed"""
    seed: int = 0
    """seed of all randomness, from 0 to 2^64 − 1"""
    accept_changed: tuple[Changed, ...] = ()
    """with resume: continue although this has changed since the checkpoint was saved;
    history: metrics.jsonl lacks steps"""
    checkpoint_every: int = 50
    """steps between checkpoints; also one at the end and on interruption"""
    checkpoint_keep: int = 2
    """latest checkpoints to keep"""
    checkpoint_keep_every: int | None = None
    """also keep the checkpoints of steps that this divides"""
    checkpoint_keep_highest: str | None = None
    """also save and keep the checkpoint with the highest value of this held-out metric,
    for example eval/score_mean"""
    checkpoint_keep_lowest: str | None = None
    """the same with the lowest value, for example eval/loss"""
    eval_every: int = 20
    """steps between evaluations on held-out data; also one at start and end"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """after a NaN or infinite loss or gradient: stop, or skip the step and train on the
    next batch; either way, the batch is saved in nonfinite/ for rlhf-jax replay"""
    max_skipped: int = 10
    """steps of the whole run that on-nonfinite=skip may skip before it stops"""
    dtype: Dtype = "float32"
    """dtype of activations and frozen models; trainable parameters are float32"""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """low-rank adapters"""
    remat: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """run the blocks under a scan: deep models compile faster; slower on CPU"""
    tensorboard: bool = False
    """also write TensorBoard files (needs the extra "tensorboard")"""
    wandb: bool = False
    """also log to Weights & Biases (needs the extra "wandb")"""
    quiet: bool = False
    """print only errors"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """device mesh"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self)
        check(bool(self.run_dir), "run-dir", self.run_dir, "name a directory")
        check_positive(
            checkpoint_every=self.checkpoint_every,
            eval_every=self.eval_every,
            max_skipped=self.max_skipped,
        )
        if self.on_nonfinite != "skip":
            why = "has no effect without on-nonfinite=skip"
            require_defaults(self, "", "max_skipped", why=why)
        check(
            self.on_nonfinite != "skip" or self.undoes_updates,
            "on-nonfinite",
            self.on_nonfinite,
            "requires undo-updates: without it, a failed update leaves its first steps",
        )
        check(
            self.resume_step is None or self.resume,
            "resume-step",
            self.resume_step,
            "requires --resume",
        )
        check(
            not self.accept_changed or self.resume,
            "accept-changed",
            " ".join(self.accept_changed),
            "requires --resume",
        )
        check_positive(checkpoint_keep=self.checkpoint_keep)
        every = self.checkpoint_keep_every
        check(
            every is None or (every > 0 and every % self.checkpoint_every == 0),
            "checkpoint-keep-every",
            every,
            f"must be a multiple of checkpoint-every={self.checkpoint_every}",
        )
        self.lora.validate("lora")
        self.mesh.validate("mesh")

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        raise NotImplementedError

    @property
    def undoes_updates(self) -> bool:
        """Whether a failed step leaves the state exactly as it was."""
        return True

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rates by flag, without the dashes."""
        raise NotImplementedError

    def input_files(self) -> dict[str, str | None]:
        """Option → file that the run reads; unchanged when a run resumes."""
        raise NotImplementedError

    def tokenizer_source(self) -> str | None:
        """The checkpoint with the tokenizer and chat template of the run."""
        raise NotImplementedError

    def reward_files(self) -> tuple[str, ...]:
        """Reward functions in files, as `file.py:function`."""
        return ()

    def unsaved_models(self) -> dict[str, str | None]:
        """Option → checkpoint whose weights the run reads but does not save.

        They must be unchanged when a run resumes. None: not read, or saved.
        """
        raise NotImplementedError

    def free_on_resume(self) -> tuple[str, ...]:
        """Options that a resumed run may change."""
        if self.lora.dropout > 0:  # drawn per microbatch
            return FREE_ON_RESUME
        # Affects memory and time, and training only by rounding.
        return (*FREE_ON_RESUME, "microbatches")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values, for YAML."""
    return dataclasses.asdict(config)


def from_dict(kind: Any, values: Mapping[str, Any]) -> Any:
    """The configuration, of a class, of which `to_dict` or JSON has these values.

    Raises:
        TypeError: an option is unknown.
    """
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    options = {}
    for name, value in values.items():
        section = types.get(name)
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(section, type) and dataclasses.is_dataclass(section):
            value = from_dict(section, value)
        options[name] = value
    return kind(**options)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        ValueError: the file is missing, malformed or not a mapping.
    """
    from rlhf_jax.files.bounded_yaml import read_yaml  # yaml is slow to import

    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain `key: value` lines")
    return values
