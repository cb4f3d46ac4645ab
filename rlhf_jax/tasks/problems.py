"""Splits, sampling and demonstrations shared by tasks with a correct answer.

Splits of a task are disjoint for all seeds:

- "train" and "heldout" are equally hard; a fixed rule holds out one problem in five
- "harder" has problems of a difficulty that is in neither of the others
"""

import dataclasses
from typing import Literal

import numpy as np

Seed = int | np.random.Generator
Split = Literal["train", "heldout", "harder"]

# No two digits are adjacent. A tokenizer trained only on this text (with
# `min_frequency=1`) has few tokens for the tags, and one for each digit.
TAGS_TEXT = "<think>0</think><answer>0</answer>"

_HELDOUT_EVERY = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A demonstration. `dataclasses.asdict` makes it a row of a file."""

    prompt: str
    completion: str
    answer: str


def demonstrate(prompt: str, answer: str, steps: str | None = None) -> Demonstration:
    """Only the answer, or the DeepSeek-R1 format if there are steps."""
    if steps is None:
        return Demonstration(prompt=prompt, completion=answer, answer=answer)
    completion = f"<think>{steps}</think><answer>{answer}</answer>"
    return Demonstration(prompt=prompt, completion=completion, answer=answer)


def in_split(split: Split, keys: np.ndarray, harder: np.ndarray) -> np.ndarray:
    """The problems of a split.

    Args:
        split: the split.
        keys: `[N]`, integers ≥ 0; problems with the same key are in the same split.
        harder: `[N]` bool, of the difficulty that is held out.

    Returns:
        `[N]` bool.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "heldout", "harder"):
        raise ValueError(
            f"split={split!r} is unknown; expected 'train', 'heldout' or 'harder'"
        )
    if split == "harder":
        return harder
    held_out = _scramble(keys) % _HELDOUT_EVERY == 0
    return ~harder & (held_out if split == "heldout" else ~held_out)


def draw_distinct(seed: Seed, number: int, available: int, what: str) -> list[int]:
    """`number` different indices below `available`, in random order.

    Raises:
        ValueError: if `number` is negative or more than `available`.
    """
    if not 0 <= number <= available:
        raise ValueError(
            f"number={number}: expected 0 to {available}, the number of different "
            f"{what}"
        )
    return np.random.default_rng(seed).permutation(available)[:number].tolist()


def _scramble(keys: np.ndarray) -> np.ndarray:
    """`[N]` uint64 hashes of the keys, the same on every machine.

    References:
        Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators":
        SplitMix64, the first output for the seed that is the key.
    """
    mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
