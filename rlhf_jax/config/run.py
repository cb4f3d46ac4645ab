"""The parts that configurations are made of: flags, file keys and help.

The string below each field is its help on the command line.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.algo.options import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: a few trained columns beside each frozen matrix."""

    rank: int = 0
    """columns of the adapters; 0: no adapters, everything is trained"""
    alpha: float = 16.0
    """adapters count alpha / rank times; their learning rate is usually about ten times
    that of full training"""
    rslora: bool = False
    """alpha / √rank instead, so that large ranks learn as fast as small ones"""
    targets: tuple[str, ...] = ("*",)
    """linear layers of the blocks that get adapters: query, key, value, output, gate,
    up, down; * stands for any text. All others stay as they are, as do embeddings and
    norms; the score vector of a reward model or critic is trained in full"""
    dropout: float = 0.0
    """share of an adapter's inputs that is dropped in training, for sft and reward; ppo
    and grpo refuse it: what answered and what learns would be two networks, and their
    ratio not 1 at the first step"""
    adapter: str | None = None
    """directory of an adapter in PEFT's format to go on training; it brings rank,
    alpha, rslora and targets"""
    base_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """how frozen networks are stored; int8 is of the blocks' matrices, a scale for each
    output, the rest as dtype says. None: as dtype"""
    merge: bool = True
    """also write the model with the adapter in it, as model/, beside adapter/"""

    @property
    def is_on(self) -> bool:
        """Whether there are adapters."""
        return self.rank > 0 or self.adapter is not None

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(self.rank >= 0, f"{name}.rank", self.rank, "must be 0 or more")
        check(
            0 < self.alpha < math.inf,
            f"{name}.alpha",
            self.alpha,
            "must be a finite number above 0",
        )
        check(
            0 <= self.dropout < 1, f"{name}.dropout", self.dropout, "must lie in [0, 1)"
        )
        check(
            bool(self.targets),
            f"{name}.targets",
            self.targets,
            "name at least one linear layer, such as query value",
        )
        if self.adapter is not None:
            shape = ("rank", "alpha", "rslora", "targets")
            self._require_defaults(name, shape, f"comes with {name}.adapter")
        elif self.rank == 0:
            others = [f.name for f in dataclasses.fields(self)]
            self._require_defaults(name, others, f"does nothing without {name}.rank")

    def _require_defaults(self, prefix: str, names, why: str) -> None:
        for field in dataclasses.fields(self):
            if field.name in names:
                value = vars(self)[field.name]
                flag = f"{prefix}.{field.name.replace('_', '-')}"
                check(value == field.default, flag, value, f"{why}; leave it out")


Dtype = Literal["float32", "bfloat16"]
Overlong = Literal["drop", "truncate", "fail"]


def check_positive(prefix: str = "", **fields: int) -> None:
    """Raises ValueError naming the first field below 1."""
    for name, value in fields.items():
        flag = prefix + name.replace("_", "-")
        check(value >= 1, flag, value, "must be at least 1")


def check_unit(prefix: str = "", **fields: float) -> None:
    """Raises ValueError naming the first field outside [0, 1]."""
    for name, value in fields.items():
        flag = prefix + name.replace("_", "-")
        check(0 <= value <= 1, flag, value, "must lie in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshModelConfig:
    """Shape of a model built from nothing, where no checkpoint is given."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """architecture; the written directory opens as this family everywhere"""
    vocab_size: int = 1024
    """entries of the byte-level BPE tokenizer that is trained on the data"""
    width: int = 128
    """size of the residual stream"""
    num_layers: int = 4
    """number of blocks"""
    num_heads: int = 4
    """attention heads; divides width"""
    max_positions: int = 512
    """longest sequence the model can read, in tokens"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_positive(
            f"{name}.",
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
        )
        check(
            self.vocab_size >= 258,
            f"{name}.vocab-size",
            self.vocab_size,
            "must be at least 258: 256 bytes and two special tokens",
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
    """share of all optimizer steps over which the rate grows from 0"""
    end_fraction: float = 0.1
    """share of the peak that is left at the end (linear, cosine)"""
    b1: float = 0.9
    """decay of the first moment"""
    b2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    form: Literal["torch", "tf1"] = "torch"
    """where eps stands: beside the bias-corrected root of the second moment, or beside
    the uncorrected one, which damps the first steps"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    decay: Literal["matrices", "all"] = "matrices"
    """what decays: kernels and embeddings, or also biases, norms and heads"""
    max_grad_norm: float = 1.0
    """gradients of a larger global norm are scaled down; 0: never"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            0 <= self.learning_rate < math.inf,
            f"{name}.learning-rate",
            self.learning_rate,
            "must be a finite number, not negative",
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
        check(
            self.decay == "matrices" or self.weight_decay > 0,
            f"{name}.decay",
            self.decay,
            f"does nothing without {name}.weight-decay",
        )
        check(
            self.max_grad_norm >= 0,
            f"{name}.max-grad-norm",
            self.max_grad_norm,
            "must be above 0, or 0 for no clipping",
        )
        check(0 <= self.b1 < 1, f"{name}.b1", self.b1, "must lie in [0, 1)")
        check(0 <= self.b2 < 1, f"{name}.b2", self.b2, "must lie in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work."""

    data: int = 1
    """groups of devices that each hold a part of the batch"""
    fsdp: int = 1
    """devices in a group; they share batch, parameters and optimizer state"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(self.data >= 1, f"{name}.data", self.data, "must be at least 1")
        check(self.fsdp >= 1, f"{name}.fsdp", self.fsdp, "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

    run_dir: str
    """directory of this run: configuration, metrics, checkpoints, model, report"""
    resume: bool = False
    """go on from the newest checkpoint in the run directory"""
    resume_step: int | None = None
    """with resume: go on from the checkpoint of this step instead; later checkpoints,
    and what was logged after it, are removed"""
    seed: int = 0
    """all randomness of the run follows from it"""
    checkpoint_every: int = 50
    """steps between checkpoints; one is also written at the end and on interruption"""
    eval_every: int = 20
    """steps between evaluations on held-out data; one also at start and end"""
    dtype: Dtype = "float32"
    """of activations and of frozen models; trained parameters are float32"""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """low-rank adapters"""
    remat: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """run the blocks under a scan: compiles faster for deep models, slower on CPU"""
    tensorboard: bool = False
    """also write TensorBoard files (needs the extra "tensorboard")"""
    wandb: bool = False
    """also log to Weights & Biases (needs the extra "wandb")"""
    quiet: bool = False
    """print nothing but errors"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """devices"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(bool(self.run_dir), "run-dir", self.run_dir, "name a directory")
        check_positive(
            checkpoint_every=self.checkpoint_every, eval_every=self.eval_every
        )
        check(
            self.resume_step is None or self.resume,
            "resume-step",
            self.resume_step,
            "is where to resume from; add --resume",
        )
        self.lora.validate("lora")
        self.mesh.validate("mesh")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        ValueError: where the file is missing, broken or no mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"config={str(path)!r}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"config={str(path)!r}: not YAML: {line}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config={str(path)!r}: must hold `key: value` lines")
    return values
