"""Model, batch and recipe shared by both sides of a comparison.

Standard library only: the peers' interpreters also import this.
"""

import argparse
import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the models and of one update."""

    family: Literal["gpt2", "llama"] = "gpt2"
    vocab_size: int = 512
    width: int = 256
    layers: int = 4
    heads: int = 4
    batch: int = 32
    prompt: int = 32
    response: int = 64
    epochs: int = 4
    minibatches: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, value in sizes.items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for whole, part in (("batch", "minibatches"), ("width", "heads")):
            if sizes[whole] % sizes[part]:
                raise ValueError(
                    f"{whole}={sizes[whole]} is not a multiple of {part}={sizes[part]}"
                )

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one update."""
        return self.epochs * self.minibatches

    def __str__(self) -> str:
        return (
            f"{self.family} V={self.vocab_size} D={self.width} layers={self.layers} "
            f"heads={self.heads}, batch {self.batch}, prompt {self.prompt}, "
            f"response {self.response}, {self.dtype}"
        )


SMOKE = Shape(vocab_size=64, width=32, layers=1, heads=2, batch=8, prompt=8, response=8)
"""Compiles and runs in seconds; its times are meaningless."""


def add_shape_arguments(parser: argparse.ArgumentParser, default: Shape) -> None:
    """One flag per field, `--vocab-size` for `vocab_size`."""
    choices = {"family": ["gpt2", "llama"], "dtype": ["float32", "bfloat16"]}
    group = parser.add_argument_group("shape")
    for name, value in dataclasses.asdict(default).items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=type(value),
            choices=choices.get(name),
            help=f"default {value}",
        )


def given_shape(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, default: Shape
) -> Shape:
    """The default shape with the flags' changes."""
    flags = vars(arguments)
    names = [field.name for field in dataclasses.fields(Shape)]
    given = {name: flags[name] for name in names if flags[name] is not None}
    try:
        return dataclasses.replace(default, **given)
    except ValueError as error:
        parser.error(str(error))
