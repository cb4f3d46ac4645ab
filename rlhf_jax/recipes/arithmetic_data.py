"""The files of `rlhf-jax arithmetic`: what is imitated, and the problems to solve."""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_jax.recipes.arithmetic_config import ArithmeticConfig
from rlhf_jax.recipes.showcase import write_rows
from rlhf_jax.tasks.arithmetic import (
    count_problems,
    make_demonstrations,
    make_problems,
)
from rlhf_jax.tasks.arithmetic_text import ask_to_reason, make_text
from rlhf_jax.tasks.problems import Split

NUM_PROBLEMS = 4_000  # to learn from; as many are in the other files, where there are
NUM_HELD_OUT_TEXTS = 256

TEXTS = "demonstrations.jsonl"
TEXTS_HELD_OUT = "demonstrations_held_out.jsonl"
PROBLEMS = {
    "train": "problems.jsonl",
    "heldout": "problems_held_out.jsonl",
    "harder": "problems_harder.jsonl",
}


def write_data(config: ArithmeticConfig, root: Path) -> None:
    """Writes all files; the same configuration writes the same."""
    seed = 100 * config.seed
    write_rows(root / TEXTS, _texts(config, seed, config.demonstrations, "train"))
    write_rows(
        root / TEXTS_HELD_OUT,
        _texts(config, seed + 1, NUM_HELD_OUT_TEXTS, "heldout"),
    )
    splits: tuple[Split, ...] = ("train", "heldout", "harder")
    for number, split in enumerate(splits):
        rows = _problems(config, seed + 2 + number, split)
        if rows:  # single digits have no harder problems
            write_rows(root / PROBLEMS[split], rows)


def _texts(
    config: ArithmeticConfig, seed: int, number: int, split: Split
) -> list[dict[str, Any]]:
    number = min(number, _available(config, split))
    options: dict[str, Any] = {
        "digits": config.digits,
        "operations": config.operations,
        "slips": config.slips,
    }
    if config.form == "r1-zero":
        return [{"text": text} for text in make_text(seed, number, split, **options)]
    rows = make_demonstrations(
        seed, number, split, reasoning=config.form == "reasoning", **options
    )
    return [dataclasses.asdict(row) for row in rows]


def _problems(
    config: ArithmeticConfig, seed: int, split: Split
) -> list[dict[str, str]]:
    found = make_problems(
        seed,
        min(NUM_PROBLEMS, _available(config, split)),
        split,
        digits=config.digits,
        operations=config.operations,
    )
    ask = ask_to_reason if config.form == "r1-zero" else str
    return [{"prompt": ask(p.prompt), "answer": p.answer} for p in found]


def _available(config: ArithmeticConfig, split: Split) -> int:
    return count_problems(split, digits=config.digits, operations=config.operations)
