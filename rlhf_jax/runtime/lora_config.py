"""The options of low-rank adapters: flags, file keys and help.

The string below each field is its help on the command line.
"""

import dataclasses
import math
from typing import Literal

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
