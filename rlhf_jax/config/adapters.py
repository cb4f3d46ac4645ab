"""Options of low-rank adapters.

The string below each field is its command-line help.
"""

import dataclasses
import math
from typing import Literal

from rlhf_jax.algo.options import check, require_defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA: trainable low-rank adapters on frozen matrices."""

    rank: int = 0
    """rank of the adapters; 0: no adapters, all parameters are trained"""
    alpha: float = 16.0
    """adapters are scaled by alpha / rank; their learning rate is usually about ten
    times that of full training"""
    rslora: bool = False
    """scale by alpha / √rank instead, so large ranks learn as fast as small ones"""
    targets: tuple[str, ...] = ("*",)
    """linear layers of the blocks that get adapters: query, key, value, output, gate,
    up, down; * matches any text. All others are frozen, as are embeddings and norms;
    the score head of a reward model or critic is fully trained"""
    dropout: float = 0.0
    """dropout on adapter inputs; ppo and grpo reject it, because
    the ratio would not be 1 at the first step"""
    adapter: str | None = None
    """directory of a PEFT adapter to continue training; sets rank, alpha, rslora and
    targets"""
    base_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """storage of frozen networks; int8 applies to the blocks' matrices, with a scale
    per output, the rest uses dtype. None: dtype"""
    merge: bool = True
    """also write the merged model to model/, besides adapter/"""

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
            "must be positive and finite",
        )
        check(
            0 <= self.dropout < 1, f"{name}.dropout", self.dropout, "must be in [0, 1)"
        )
        check(
            bool(self.targets),
            f"{name}.targets",
            self.targets,
            "name at least one linear layer, such as query value",
        )
        if self.adapter is not None:
            shape = ("rank", "alpha", "rslora", "targets")
            require_defaults(self, name, *shape, why=f"comes with {name}.adapter")
        elif self.rank == 0:
            others = [f.name for f in dataclasses.fields(self)]
            why = f"has no effect without {name}.rank"
            require_defaults(self, name, *others, why=why)
