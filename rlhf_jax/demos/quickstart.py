"""All three stages on short reviews, from scratch, evaluated by the true reward.

Training uses demonstrations and the noisy judgements of a simulated annotator. The true
reward behind these judgements is only used for the final evaluation.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rlhf_jax.algo.options import KLOptions, ScoreOptions
from rlhf_jax.config.demos import QuickstartConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import FreshModelConfig, OptimizerConfig
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.data.text_data import PreferencePair
from rlhf_jax.demos.review_panel import MAX_NEW_TOKENS, MAX_POSITIONS, ReviewPanel
from rlhf_jax.demos.showcase import (
    make_directory,
    print_table,
    resumable,
    write_rows,
)
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.recipes import reward_model as reward_stage
from rlhf_jax.run.progress import heading
from rlhf_jax.run.report import write_report
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.tasks import reviews

NUM_DEMONSTRATIONS = 8_000
NUM_GRAMMAR_PAIRS = 14_000
NUM_SAMPLED_PAIRS = 6_000  # pairs of SFT samples: the initial distribution of PPO
NUM_PROMPTS = 4_000
NUM_HELD_OUT = 1_024  # rows of each kind
MAX_TOKENS = 48
HELD_OUT_PAIRS = "pairs_held_out.jsonl"
BATCH_SIZE = 64


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Runs or resumes all stages; prints a table and returns the summary.

    Raises:
        ValueError: if the run directory holds something else.
        Interrupted: after saving a checkpoint, when asked to stop; rerun to resume.
    """
    began = time.perf_counter()
    config.validate()
    root = Path(config.run_dir)
    _check_directory(config, root)
    with resumable("quickstart"):
        sft_model, reward, policy = _train(config, root)

    heading("held-out prompts, scored by the true reward", quiet=config.quiet)
    panel = ReviewPanel(sft_model.model, reward.model)
    policies = panel.compare(policy.model, seed=stage_seed(config, 3))
    pairs, best_possible = _read_held_out_pairs(root)
    summary = {
        "seed": config.seed,
        "reward_model": {
            "held_out_pairs": len(pairs),
            "accuracy": panel.pair_accuracy(pairs),
            "best_possible_accuracy": best_possible,
        },
        "policies": policies,
        "ppo_gain_in_sft_std": (
            (policies[-1]["true reward"] - policies[0]["true reward"])
            / policies[0]["true reward std"]
        ),
        "seconds_since_last_start": time.perf_counter() - began,
    }
    write_atomic(root / "summary.json", json.dumps(summary, indent=2) + "\n")
    notes = _notes(summary)
    write_report(policy.path, title="Quickstart: reviews", table=policies, notes=notes)
    print_table([_shown(row) for row in policies], notes=notes)
    if not config.quiet:
        _print_next_steps(root)
    return summary


def _train(
    config: QuickstartConfig, root: Path
) -> tuple[RunDirectory, RunDirectory, RunDirectory]:
    """Runs the three stages in sequence; finished ones are reused."""
    heading("1/3  supervised fine-tuning on reviews", quiet=config.quiet)
    write_demonstrations(root, stage_seed(config, 0))
    sft_run = sft.run(sft_config(config, root))

    heading("2/3  reward model: learn the annotator's preferences", quiet=config.quiet)
    if not (root / HELD_OUT_PAIRS).exists():  # the last file written
        write_pairs(root, stage_seed(config, 1), ReviewPanel(sft_run.model))
    reward_run = reward_stage.run(reward_config(config, root))

    heading("3/3  PPO against the reward model, with a KL penalty", quiet=config.quiet)
    write_prompts(root, stage_seed(config, 2))
    ppo_run = ppo.run(ppo_config(config, root))
    return sft_run, reward_run, ppo_run


def stage_seed(config: QuickstartConfig, number: int) -> int:
    """A distinct seed for each part of a run, and for each run seed."""
    return 100 * config.seed + 10 * number


def _check_directory(config: QuickstartConfig, root: Path) -> None:
    """Creates the directory, or reuses one of a quickstart with the same seed."""
    marker = root / "quickstart.json"
    wanted = {"seed": config.seed}
    if marker.exists():
        found = read_object(marker)
        if found != wanted:
            raise ValueError(
                f"--run-dir {root} holds a quickstart with seed {found.get('seed')}; "
                "give that seed to resume it, or another --run-dir for seed "
                f"{config.seed}"
            )
        return
    make_directory(root)
    write_atomic(marker, json.dumps(wanted) + "\n")


def sft_config(config: QuickstartConfig, root: Path) -> SFTConfig:
    """Stage 1, from nothing."""
    run_dir = root / "sft"
    return SFTConfig(
        run_dir=str(run_dir),
        resume=(run_dir / "config.yaml").exists(),
        data=str(root / "demonstrations.jsonl"),
        eval_data=str(root / "demonstrations_held_out.jsonl"),
        fresh=FreshModelConfig(
            family="llama", vocab_size=768, num_layers=3, max_positions=MAX_POSITIONS
        ),
        max_tokens=MAX_TOKENS,
        steps=400,
        batch_size=BATCH_SIZE,
        eval_every=100,
        checkpoint_every=200,
        optimizer=OptimizerConfig(learning_rate=6e-3),
        seed=config.seed,
        quiet=config.quiet,
    )


def reward_config(config: QuickstartConfig, root: Path) -> RewardConfig:
    """Stage 2, from the SFT model."""
    run_dir = root / "reward"
    return RewardConfig(
        run_dir=str(run_dir),
        resume=(run_dir / "config.yaml").exists(),
        data=str(root / "pairs.jsonl"),
        eval_data=str(root / HELD_OUT_PAIRS),
        model=str(root / "sft" / "model"),
        max_tokens=MAX_TOKENS,
        steps=400,
        batch_size=BATCH_SIZE,
        eval_every=100,
        checkpoint_every=200,
        optimizer=OptimizerConfig(learning_rate=2e-3),
        seed=config.seed,
        quiet=config.quiet,
    )


def ppo_config(config: QuickstartConfig, root: Path) -> PPOConfig:
    """Stage 3, from both models."""
    run_dir = root / "ppo"
    return PPOConfig(
        run_dir=str(run_dir),
        resume=(run_dir / "config.yaml").exists(),
        policy=str(root / "sft" / "model"),
        reward_model=str(root / "reward" / "model"),
        data=str(root / "prompts.jsonl"),
        eval_data=str(root / "prompts_held_out.jsonl"),
        max_new_tokens=MAX_NEW_TOKENS,
        updates=60,
        batch_size=BATCH_SIZE,
        eval_every=15,
        checkpoint_every=30,
        kl=KLOptions(coef=0.1),
        scores=ScoreOptions(missing_eos="subtract"),  # reviews must end
        seed=config.seed,
        quiet=config.quiet,
    )


def write_demonstrations(root: Path, seed: int) -> None:
    """Demonstrations, training and held out."""

    def write(name: str, number: int, split: reviews.Split) -> None:
        rows = reviews.make_demonstrations(seed, number, split)
        write_rows(
            root / f"{name}.jsonl",
            [{"prompt": row.prompt, "completion": row.response} for row in rows],
        )

    write("demonstrations", NUM_DEMONSTRATIONS, "train")
    write("demonstrations_held_out", NUM_HELD_OUT, "heldout")


def write_pairs(root: Path, seed: int, panel: ReviewPanel) -> None:
    """Preference pairs, from the grammar and from samples."""

    def write(
        name: str, from_grammar: int, from_samples: int, split: reviews.Split
    ) -> None:
        pairs = reviews.make_preferences(seed, from_grammar, split)
        prompts = reviews.make_prompts(seed + 1, from_samples, split)
        first, _ = panel.answers(prompts, seed=seed)
        second, _ = panel.answers(prompts, seed=seed + 1)
        differ = [i for i in range(len(prompts)) if first[i] != second[i]]
        pairs += reviews.label_pairs(
            seed,
            [prompts[i] for i in differ],
            [first[i] for i in differ],
            [second[i] for i in differ],
        )
        write_rows(root / name, [dataclasses.asdict(pair) for pair in pairs])

    write("pairs.jsonl", NUM_GRAMMAR_PAIRS, NUM_SAMPLED_PAIRS, "train")
    write(HELD_OUT_PAIRS, NUM_HELD_OUT, NUM_HELD_OUT, "heldout")


def _read_held_out_pairs(root: Path) -> tuple[list[PreferencePair], float]:
    """Held-out pairs, and the best possible accuracy on them."""
    lines = (root / HELD_OUT_PAIRS).read_text("utf-8").splitlines()
    pairs = [reviews.Preference(**json.loads(line)) for line in lines]
    rows = [PreferencePair(p.prompt, p.chosen, p.rejected) for p in pairs]
    return rows, reviews.bayes_accuracy(pairs)


def write_prompts(root: Path, seed: int) -> None:
    """Prompts for PPO, training and held out."""

    def write(name: str, number: int, split: reviews.Split) -> None:
        prompts = reviews.make_prompts(seed, number, split)
        write_rows(root / f"{name}.jsonl", [{"prompt": text} for text in prompts])

    write("prompts", NUM_PROMPTS, "train")
    write("prompts_held_out", NUM_HELD_OUT, "heldout")


def _notes(summary: dict[str, Any]) -> list[str]:
    reward = summary["reward_model"]
    return [
        f"The reward model ranks {reward['accuracy']:.1%} of "
        f"{reward['held_out_pairs']} held-out pairs correctly; the annotator's noise "
        f"limits this to {reward['best_possible_accuracy']:.1%}.",
        f"PPO raised the true reward, which training never sees, by "
        f"{summary['ppo_gain_in_sft_std']:.2f} standard deviations of the SFT model's "
        f"responses.",
    ]


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {k: v if isinstance(v, str) else f"{v:.2f}" for k, v in row.items()}


def _print_next_steps(root: Path) -> None:
    heading(
        f"\nSee {root}/ppo/report.html, {root}/reward/report.html and "
        f"{root}/sft/report.html.\nNext:\n"
        f"  rlhf-jax generate --model {root}/ppo/model "
        "--prompt 'Review of the film The Silent Harbour:' --samples 4\n"
        f"  rlhf-jax ppo --config {root}/ppo/config.yaml --run-dir runs/no-kl "
        "--kl.coef 0    # what happens without the KL penalty?\n"
        "  rlhf-jax sft --help    # the same stages on your own data"
    )
