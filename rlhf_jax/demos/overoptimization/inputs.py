"""Input checks of `rlhf-jax overoptimization`, before anything is written or
trained."""

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
"""Options that may differ between runs in one directory: display and lists of runs"""


def check_source(config: OveroptimizationConfig) -> None:
    """Raises ValueError if a quickstart lacks files or has too few rows.

    If none is given, checks the rows that will be created; the actual number of pairs
    is slightly smaller if two samples are identical, see `check_pairs`.
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
                "that quickstart, or omit the option to create one here"
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
    """Raises ValueError if the reward models need more pairs than there are."""
    parts = num_parts(config)
    check(
        parts * config.pairs <= num_pairs,
        "pairs",
        config.pairs,
        f"{parts} × {config.pairs} are more than the {num_pairs} {where}",
    )


def num_parts(config: OveroptimizationConfig) -> int:
    """The number of disjoint sets of pairs to train reward models on."""
    return config.models if config.ensemble_pairs == "own" else 1


def read_lines(path: Path) -> list[str]:
    """Rows of a JSONL file, as text."""
    return path.read_text("utf-8").splitlines()


def enter_directory(config: OveroptimizationConfig, root: Path) -> None:
    """Creates the directory, or reuses one with the same options.

    All options not in `FREE` affect the stored results: reward models, samples for
    best-of-n and PPO runs.

    Raises:
        ValueError: if it has other options or holds something else; nothing is written.
    """
    options = dataclasses.asdict(config)
    shaping = {name: options[name] for name in options if name not in FREE}
    showcase.enter_directory(root, MARKER, shaping)
