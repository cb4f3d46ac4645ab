"""PPO with one option changed at a time, and the effect on the true reward.

    python benchmarks/ablation.py                              # ten cases, three seeds
    python benchmarks/ablation.py --cases lambda-1 one-epoch --seeds 5
    python benchmarks/ablation.py --cases debated extras       # more cases

The task is that of `rlhf-jax quickstart`: short reviews whose true reward is known but
hidden from training. An SFT model and a reward model are trained once. PPO then runs
once per case and seed: the default is the quickstart's PPO stage with fewer updates,
every other case changes one option. Each policy is evaluated on the same held-out
prompts by the true reward, the reward model, and its KL to the SFT model.

The work directory gets `ablation.md` (a table), `ablation.png` (a plot) and
`ablation.jsonl` (a line per run). Running the same command again, also with more cases
or seeds, resumes. It takes about 25 minutes on 2 otherwise idle cores.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timing
from ablation_cases import list_cases, select
from ablation_report import Run, draw, markdown, summarize
from ablation_runs import Job, judge, run_all

from rlhf_jax.cli import quieten_libraries, use_compilation_cache
from rlhf_jax.config.demos import QuickstartConfig
from rlhf_jax.demos import quickstart
from rlhf_jax.demos.review_panel import ReviewPanel
from rlhf_jax.recipes import reward_model as reward_stage
from rlhf_jax.recipes import sft
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import write_atomic

FULL: dict[str, Any] = {
    "cases": ["debated"],
    "seeds": 3,
    "updates": 40,
    "batch_size": 64,
}
SMOKE: dict[str, Any] = {
    "cases": ["no-whitening"],
    "seeds": 2,
    "updates": 2,
    "batch_size": 16,
}
NUM_JUDGED, NUM_JUDGED_SMOKE = 1_024, 64  # prompts for every policy


def train_models(
    root: Path, seed: int, *, smoke: bool, family: Literal["gpt2", "llama"] = "llama"
) -> None:
    """The quickstart's first two stages and its prompts; existing ones are kept."""
    complete = root / "complete"
    if complete.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    config = QuickstartConfig(run_dir=str(root), seed=seed)
    quickstart.write_demonstrations(root, quickstart.stage_seed(config, 0))
    sft_config = quickstart.sft_config(config, root)
    fresh = dataclasses.replace(sft_config.fresh, family=family)
    if smoke:
        fresh = dataclasses.replace(fresh, width=32, num_layers=1)
        sft_config = dataclasses.replace(sft_config, steps=5)
    sft_config = dataclasses.replace(sft_config, fresh=fresh)
    heading("SFT model")
    sft_run = sft.run(sft_config)

    heading("reward model")
    if not (root / quickstart.HELD_OUT_PAIRS).exists():
        panel = ReviewPanel(sft_run.model)
        quickstart.write_pairs(root, quickstart.stage_seed(config, 1), panel)
    reward_config = quickstart.reward_config(config, root)
    steps = 5 if smoke else reward_config.steps
    reward_stage.run(dataclasses.replace(reward_config, steps=steps))
    quickstart.write_prompts(root, quickstart.stage_seed(config, 2))
    complete.touch()


def make_jobs(arguments: argparse.Namespace, root: Path) -> list[Job]:
    """All cases with the first seed, then with the next.

    Raises:
        ValueError: a case is incompatible with the sizes.
    """
    models = root / f"models-{arguments.base_seed}"
    config = QuickstartConfig(run_dir=str(models), seed=arguments.base_seed)
    sizes = f"{arguments.updates}-updates-of-{arguments.batch_size}"
    jobs = []
    for seed in range(arguments.seeds):
        default = dataclasses.replace(
            quickstart.ppo_config(config, models),
            updates=arguments.updates,
            batch_size=arguments.batch_size,
            eval_every=arguments.updates,
            checkpoint_every=arguments.updates,
            seed=seed,
            quiet=True,
        )
        for case in select(arguments.cases):
            run_dir = models / sizes / case.name / f"seed-{seed}"
            jobs.append(
                Job(
                    case=case,
                    config=dataclasses.replace(
                        case.configure(default), run_dir=str(run_dir)
                    ),
                    models=models,
                    num_judged=NUM_JUDGED_SMOKE if arguments.smoke else NUM_JUDGED,
                )
            )
    return jobs


def train_and_run(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[Run]:
    """Outcomes of all jobs.

    Raises:
        ValueError: the work directory contains runs with other options.
        SystemExit: after Ctrl-C, with how to resume.
    """
    try:
        train_models(jobs[0].models, arguments.base_seed, smoke=arguments.smoke)
        return run_all(jobs, arguments.jobs)
    except (KeyboardInterrupt, SystemExit):
        sys.exit("Stopped. Run the same command again to resume.")


def publish(jobs: Sequence[Job], runs: Sequence[Run], root: Path) -> None:
    """Writes table, plot and lines; prints the table, and the summaries as JSON."""
    config, models = jobs[0].config, jobs[0].models
    num_seeds = len({job.config.seed for job in jobs})
    cases = list(dict.fromkeys(job.case for job in jobs))
    summaries = summarize(cases, runs)
    sft_figures = judge(models, models / "sft" / "model", jobs[0].num_judged)
    machine = timing.machine()
    title = (
        f"PPO with one option changed: {config.updates} updates × {config.batch_size} "
        f"responses, {num_seeds} seed{'s' * (num_seeds > 1)}"
    )
    table = markdown(
        summaries, sft_figures, title=title, machine=machine, num_seeds=num_seeds
    )
    write_atomic(root / "ablation.md", table)
    lines = "".join(job.result.read_text("utf-8") for job in jobs)
    write_atomic(root / "ablation.jsonl", lines)
    draw(summaries, root / "ablation.png", title=title)
    print(f"\n{table}\nWritten: {root}/ablation.md, .png and .jsonl")
    timing.print_result(
        {
            "benchmark": "ablation",
            "machine": machine,
            "updates": config.updates,
            "batch_size": config.batch_size,
            "num_judged": jobs[0].num_judged,
            "sft": sft_figures,
            "cases": [summary.to_dict() for summary in summaries],
        }
    )


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"cases, by group, and their flags of `rlhf-jax ppo`:"
        f"\n\n{list_cases()}\n\nA preset is a complete method with the learning "
        "rates of its original, which are meant for\nmodels with billions of "
        "parameters and are far too small here: its row shows little else.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--work-dir",
        type=Path,
        default=Path("runs/ablation"),
        metavar="DIR",
        help="models, runs and results; default runs/ablation",
    )
    add(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="names or groups, see below; default: debated. The default configuration "
        "always runs too",
    )
    add("--seeds", type=int, metavar="N", help="PPO seeds 0 to N − 1; default 3")
    add(
        "--base-seed",
        type=int,
        default=0,
        metavar="SEED",
        help="seed of the SFT and reward model, shared by all runs; default 0",
    )
    add(
        "--updates",
        type=int,
        metavar="N",
        help="updates per run; default 40, quickstart: 60",
    )
    add("--batch-size", type=int, metavar="N", help="responses per update; default 64")
    add(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="parallel runs, each in a process with its share of the cores; default "
        "2. Use 1 on an accelerator",
    )
    add(
        "--smoke",
        action="store_true",
        help="quick test, under a minute: tiny models, two updates",
    )
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Validated flags; defaults depend on --smoke."""
    given = vars(parser.parse_args())
    sizes = SMOKE if given["smoke"] else FULL
    given |= {name: sizes[name] for name in sizes if given[name] is None}
    for name in ("seeds", "jobs"):
        if given[name] < 1:
            parser.error(f"--{name} {given[name]} must be at least 1")
    return argparse.Namespace(**given)


def main() -> None:
    """Trains missing models and runs, and writes the results."""
    parser = make_parser()
    arguments = parse_arguments(parser)
    # Several processes share a device: none may preallocate all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    quieten_libraries()
    use_compilation_cache()
    root = arguments.work_dir / "smoke" if arguments.smoke else arguments.work_dir
    try:
        jobs = make_jobs(arguments, root)
        timing.print_machine(timing.machine())
        runs = train_and_run(jobs, arguments)
    except ValueError as error:
        parser.error(str(error))
    publish(jobs, runs, root)


if __name__ == "__main__":
    main()
