"""What `rlhf-jax overoptimization` refuses before anything is written or trained."""

import dataclasses
from pathlib import Path

from rlhf_jax.algo.options import check
from rlhf_jax.config.demos import OveroptimizationConfig
from rlhf_jax.demos import quickstart, showcase

PAIRS = "pairs.jsonl"
HELD_OUT_PROMPTS = "prompts_held_out.jsonl"
NEEDED = (
    "sft/model",
    PAIRS,
    quickstart.HELD_OUT_PAIRS,
    "prompts.jsonl",
    HELD_OUT_PROMPTS,
)
MARKER = "options.json"
FREE = ("run_dir", "quiet", "patience", "betas", "ensembles", "ensemble_beta")
"""Options that may differ in one directory: how much is shown, and which runs"""


def check_source(config: OveroptimizationConfig) -> None:
    """Raises ValueError where a quickstart lacks files, or has too few rows.

    Where none is given, the rows are those that will be made; a few pairs less than
    that are made where two sampled answers are the same, see `check_pairs`.
    """
    if config.quickstart is None:
        num_pairs = quickstart.NUM_GRAMMAR_PAIRS + quickstart.NUM_SAMPLED_PAIRS
        num_prompts, where = quickstart.NUM_HELD_OUT, "that a quickstart makes"
    else:
        given = Path(config.quickstart)
        missing = [name for name in NEEDED if not (given / name).exists()]
        if missing:
            raise ValueError(
                f"quickstart={config.quickstart!r}: it has no {missing[0]}; finish "
                "that quickstart, or leave the option out to make what is needed here"
            )
        num_pairs = len(read_lines(given / PAIRS))
        num_prompts = len(read_lines(given / HELD_OUT_PROMPTS))
        where = f"of quickstart={config.quickstart!r}"
    check_pairs(config, num_pairs, where)
    check(
        config.eval_prompts <= num_prompts,
        "eval-prompts",
        config.eval_prompts,
        f"must be at most {num_prompts}, the held-out prompts {where}",
    )


def check_pairs(config: OveroptimizationConfig, num_pairs: int, where: str) -> None:
    """Raises ValueError where the reward models need more pairs than there are."""
    parts = num_parts(config)
    check(
        parts * config.pairs <= num_pairs,
        "pairs",
        config.pairs,
        f"{parts} × {config.pairs} are more than the {num_pairs} {where}",
    )


def num_parts(config: OveroptimizationConfig) -> int:
    """Disjoint sets of pairs that the reward models learn from."""
    return config.models if config.ensemble_pairs == "own" else 1


def read_lines(path: Path) -> list[str]:
    """Rows of a JSONL file, as text."""
    return path.read_text("utf-8").splitlines()


def enter_directory(config: OveroptimizationConfig, root: Path) -> None:
    """Enters a new directory, or one that was begun with the same options.

    All that is not in `FREE` shapes what is kept there: reward models, samples for
    best-of-n and runs of PPO.

    Raises:
        ValueError: where other options began it, or it holds something else. Nothing
            is written then.
    """
    options = dataclasses.asdict(config)
    shaping = {name: options[name] for name in options if name not in FREE}
    showcase.enter_directory(root, MARKER, shaping)
