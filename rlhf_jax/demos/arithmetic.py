"""SFT, then RL from verifiable rewards, on arithmetic."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rlhf_jax.algo.options import KLOptions, ScoreOptions, check
from rlhf_jax.config.demos import ArithmeticConfig
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import FreshModelConfig, OptimizerConfig
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.demos.arithmetic_panel import SAMPLES, ArithmeticPanel
from rlhf_jax.demos.showcase import (
    enter_directory,
    print_table,
    resumable,
    write_rows,
)
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.recipes import grpo, ppo, sft
from rlhf_jax.run.progress import heading
from rlhf_jax.run.report import write_report
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.tasks.arithmetic_problems import (
    count_problems,
    make_demonstrations,
    make_problems,
)
from rlhf_jax.tasks.arithmetic_text import ask_to_reason, make_text
from rlhf_jax.tasks.problems import Split

NUM_PROBLEMS = 4_000  # for training; other files have the same number if available


NUM_HELD_OUT_TEXTS = 256


TEXTS = "demonstrations.jsonl"


TEXTS_HELD_OUT = "demonstrations_held_out.jsonl"


PROBLEMS = {
    "train": "problems.jsonl",
    "heldout": "problems_held_out.jsonl",
    "harder": "problems_harder.jsonl",
}


def write_data(config: ArithmeticConfig, root: Path) -> None:
    """Writes all files, deterministically for a configuration."""
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


EXACT = "rlhf_jax.tasks.verifiable:exact_answer"
FORMAT = "rlhf_jax.tasks.verifiable:reasoning_format"
EVAL_PROMPTS = 128  # during training; the table uses all of eval_problems
SFT_BATCH_SIZE = 64
# As DeepSeek-AI, 2025, arXiv:2501.12948. More would keep the errors of the
# demonstrations.
KL_COEF = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The hyperparameters for a form of the task."""

    vocab_size: int
    num_layers: int
    sft_steps: int
    max_prompt_tokens: int
    max_new_tokens: int
    updates: int
    learning_rate: float  # of RL


SCALES = {
    "plain": Scale(
        vocab_size=258,  # bytes: every digit is a token
        num_layers=2,
        sft_steps=4_000,
        max_prompt_tokens=8,
        max_new_tokens=8,
        updates=300,
        learning_rate=5e-4,
    ),
    # Merges occur only inside the tags. Pairs of digits are rarer, and stay two tokens.
    "reasoning": Scale(
        vocab_size=269,
        num_layers=2,
        sft_steps=800,
        max_prompt_tokens=8,
        max_new_tokens=48,
        updates=120,
        learning_rate=5e-4,
    ),
    "r1-zero": Scale(
        vocab_size=258,  # tags are spelled in letters, so unseen tags can be encoded
        num_layers=3,
        sft_steps=1_400,
        max_prompt_tokens=40,
        max_new_tokens=64,
        updates=120,
        learning_rate=3e-4,
    ),
}


def run(config: ArithmeticConfig) -> dict[str, Any]:
    """Runs or resumes all stages; prints a table and returns the summary.

    Raises:
        ValueError: on invalid input, before anything is written, or if the run
            directory holds something else.
        Interrupted: after saving a checkpoint, when asked to stop; rerun to resume.
    """
    began = time.perf_counter()
    config.validate()
    root = Path(config.run_dir)
    _check_sizes(config, policy_config(config, root))
    enter_directory(root, "arithmetic.json", _stored(config))
    with resumable("command"):
        imitated, trained = _train(config, root)

    heading("held-out problems, both policies", quiet=config.quiet)
    table = _compare(config, root, imitated, trained)
    summary = {
        "config": _stored(config),
        "policies": table,
        "gain_in_points": 100 * (table[1]["pass@1"] - table[0]["pass@1"]),
        "seconds_since_last_start": time.perf_counter() - began,
    }
    write_atomic(root / "summary.json", json.dumps(summary, indent=2) + "\n")
    notes = _notes(config, summary)
    write_report(trained.path, title="Arithmetic", table=table, notes=notes)
    shown = [{k: _shown(k, v) for k, v in row.items()} for row in table]
    print_table(shown, notes=notes)
    if not config.quiet:
        heading(f"\nSee {trained.report} and {imitated.report}.")
    return summary


def _train(config: ArithmeticConfig, root: Path) -> tuple[RunDirectory, RunDirectory]:
    """Runs both stages; finished ones are reused."""
    what = (
        "pretrain on plain text"
        if config.form == "r1-zero"
        else "train on demonstrations"
    )
    heading(f"1/2  supervised: {what}", quiet=config.quiet)
    imitated = imitate(config, root)
    heading(f"2/2  {config.method}: reward correct answers", quiet=config.quiet)
    return imitated, reinforce(config, root)


def imitate(config: ArithmeticConfig, root: Path) -> RunDirectory:
    """Runs or resumes stage 1, and writes its data."""
    stage = sft_config(config, root)
    if not stage.resume:
        write_data(config, root)
    return sft.run(stage)


def reinforce(config: ArithmeticConfig, root: Path) -> RunDirectory:
    """Runs or resumes stage 2, from the model of stage 1."""
    stage = policy_config(config, root)
    return ppo.run(stage) if isinstance(stage, PPOConfig) else grpo.run(stage)


def _check_sizes(config: ArithmeticConfig, stage: PPOConfig | GRPOConfig) -> None:
    """Raises ValueError if there are fewer problems than a step needs."""
    stage.validate()
    what = f"problems of digits={config.digits}, operations={config.operations}"
    available = count_problems(
        "train", digits=config.digits, operations=config.operations
    )
    texts = min(config.demonstrations, available)
    check(
        texts >= SFT_BATCH_SIZE,
        "demonstrations",
        config.demonstrations,
        f"of {available} {what}, {texts} are demonstrations; a batch has "
        f"{SFT_BATCH_SIZE}",
    )
    prompts, found = config.batch_size, min(available, NUM_PROBLEMS)
    if isinstance(stage, GRPOConfig):
        prompts //= stage.group_size
    check(
        prompts <= found,
        "batch-size",
        config.batch_size,
        f"needs {prompts} prompts per update; there are {found} {what}",
    )


def _stored(config: ArithmeticConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: values[name] for name in values if name not in ("run_dir", "quiet")}


def sft_config(config: ArithmeticConfig, root: Path) -> SFTConfig:
    """Stage 1, from scratch."""
    scale, run_dir = SCALES[config.form], root / "sft"
    steps = config.sft_steps or scale.sft_steps
    return SFTConfig(
        run_dir=str(run_dir),
        resume=(run_dir / "config.yaml").exists(),
        data=str(root / TEXTS),
        eval_data=str(root / TEXTS_HELD_OUT),
        fresh=FreshModelConfig(
            family="llama",
            vocab_size=scale.vocab_size,
            width=64,
            num_layers=scale.num_layers,
            max_positions=128,
        ),
        max_tokens=128,
        steps=steps,
        batch_size=SFT_BATCH_SIZE,
        eval_every=max(1, steps // 5),
        checkpoint_every=max(1, steps // 2),
        optimizer=OptimizerConfig(learning_rate=4e-3),
        seed=config.seed,
        quiet=config.quiet,
    )


def policy_config(config: ArithmeticConfig, root: Path) -> PPOConfig | GRPOConfig:
    """Stage 2, from the model of stage 1."""
    scale, run_dir = SCALES[config.form], root / config.method
    updates = config.updates or scale.updates
    common: dict[str, Any] = {
        "run_dir": str(run_dir),
        "resume": (run_dir / "config.yaml").exists(),
        "policy": str(root / "sft" / "model"),
        "reward": (EXACT,) if config.form == "plain" else (EXACT, FORMAT),
        "data": str(root / PROBLEMS["train"]),
        "eval_data": str(root / PROBLEMS["heldout"]),
        "eval_prompts": min(EVAL_PROMPTS, config.eval_problems),
        "eval_samples": SAMPLES,
        "max_prompt_tokens": scale.max_prompt_tokens,
        "max_new_tokens": scale.max_new_tokens,
        "overlong": "fail",
        "updates": updates,
        "batch_size": config.batch_size,
        "eval_every": max(1, updates // 12),
        "checkpoint_every": max(1, updates // 3),
        "seed": config.seed,
        "quiet": config.quiet,
    }
    optimizer = OptimizerConfig(
        learning_rate=config.learning_rate or scale.learning_rate,
        schedule="linear",
        warmup_fraction=0.1,
        end_fraction=0.0,
        b2=0.999,
    )
    if config.method == "ppo":
        return PPOConfig(
            **common,
            epochs=1,
            minibatches=1,
            kl=KLOptions(coef=KL_COEF),
            scores=ScoreOptions(missing_eos="subtract"),
            actor_optimizer=optimizer,
            critic_optimizer=optimizer,
        )
    method = GRPO_PRESETS[config.method]()
    if method.kl.place != "none":
        kl = dataclasses.replace(method.kl, coef=KL_COEF)
        method = dataclasses.replace(method, kl=kl)
    method = dataclasses.replace(method, optimizer=optimizer)
    return GRPOConfig(**common, **vars(method))


def _compare(
    config: ArithmeticConfig, root: Path, imitated: RunDirectory, trained: RunDirectory
) -> list[dict[str, Any]]:
    """The table: one row per model."""
    scale = SCALES[config.form]
    panel = ArithmeticPanel(
        imitated.model,
        max_prompt_tokens=scale.max_prompt_tokens,
        max_new_tokens=scale.max_new_tokens,
    )
    harder = root / PROBLEMS["harder"]
    names = ("base" if config.form == "r1-zero" else "SFT", config.method)
    rows = [
        panel.row(
            name,
            run.model,
            root / PROBLEMS["heldout"],
            harder if harder.exists() else None,
            config.eval_problems,
        )
        for name, run in zip(names, (imitated, trained), strict=True)
    ]
    if config.form == "plain":  # no form to check
        for row in rows:
            del row["form kept"]
    return rows


def _notes(config: ArithmeticConfig, summary: dict[str, Any]) -> list[str]:
    before, after = summary["policies"]
    notes = [
        f"{config.method} raised pass@1 on held-out problems from "
        f"{before['pass@1']:.1%} to {after['pass@1']:.1%}, by "
        f"{summary['gain_in_points']:.1f} points."
    ]
    if "harder pass@1" in after:
        notes.append(
            "Harder problems carry or borrow in every possible column, which no "
            "demonstration or training problem does."
        )
    return notes


def _shown(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1f}" if "tokens" in name else f"{value:.1%}"
