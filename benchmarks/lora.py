"""PPO with low-rank adapters, compared with PPO on all parameters.

    python benchmarks/lora.py                                # both families, one seed
    python benchmarks/lora.py --families llama --seeds 3

The task is that of `rlhf-jax quickstart`: short reviews whose true reward is known but
hidden from training. For each family an SFT model and a reward model are trained once.
PPO then trains all parameters or adapters, with the same options except the learning
rates, which are about ten times higher for adapters. Each policy is evaluated on the
same held-out prompts.

Then both kinds of update are timed alternately, and their memory is counted: trainable
parameters, gradients, optimizer state and frozen parameters, each array once.

The work directory gets `lora.md`, a table. Running the same command again, also with
more seeds, resumes. It takes about 25 minutes on 2 otherwise idle cores, mostly for the
SFT and reward models.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timing
from ablation import NUM_JUDGED, NUM_JUDGED_SMOKE, train_models
from ablation_cases import Case
from ablation_report import Run
from ablation_runs import Job, judge, run_all
from lora_costs import bytes_of, time_updates

from rlhf_jax.cli import quieten_libraries, use_compilation_cache
from rlhf_jax.config.demos import QuickstartConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.demos import quickstart
from rlhf_jax.run.run_directory import write_atomic

# Ten and five times the rates of the quickstart's PPO stage.
RATES_10 = "--actor-optimizer.learning-rate 1e-3 --critic-optimizer.learning-rate 3e-3"
RATES_5 = "--actor-optimizer.learning-rate 5e-4 --critic-optimizer.learning-rate 1.5e-3"
CASES = (
    Case(name="full", title="all parameters"),
    Case(name="rank-8", title="rank 8", flags=f"--lora.rank 8 {RATES_10}"),
    Case(
        name="rank-16",
        title="rank 16",
        flags=f"--lora.rank 16 --lora.alpha 32 {RATES_5}",
    ),
)
FULL: dict[str, Any] = {"families": ["gpt2", "llama"], "updates": 40, "batch_size": 64}
SMOKE: dict[str, Any] = {"families": ["llama"], "updates": 2, "batch_size": 16}


def cases(*, smoke: bool) -> tuple[Case, ...]:
    """All cases, or one of each kind for a quick test."""
    return CASES[:2] if smoke else CASES


def make_jobs(arguments: argparse.Namespace, root: Path, family: str) -> list[Job]:
    """Both cases with the first seed, then with the next."""
    models = root / family
    config = QuickstartConfig(run_dir=str(models), seed=0)
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
        for case in cases(smoke=arguments.smoke):
            run_dir = models / f"{arguments.updates}-updates" / case.name / str(seed)
            configured = dataclasses.replace(
                case.configure(default), run_dir=str(run_dir)
            )
            num_judged = NUM_JUDGED_SMOKE if arguments.smoke else NUM_JUDGED
            jobs.append(
                Job(case=case, config=configured, models=models, num_judged=num_judged)
            )
    return jobs


def measure(
    arguments: argparse.Namespace, root: Path, family: Literal["gpt2", "llama"]
) -> list[dict[str, Any]]:
    """A row for the SFT model and one for each case."""
    models = root / family
    train_models(models, 0, smoke=arguments.smoke, family=family)
    jobs = make_jobs(arguments, root, family)
    runs = run_all(jobs, arguments.jobs)
    configs: dict[str, PPOConfig] = {job.case.name: job.config for job in jobs}
    sft = judge(models, models / "sft" / "model", jobs[0].num_judged)
    rows = [{"family": family, "case": "SFT, before PPO"} | sft]
    timings = time_updates(configs, rounds=2 if arguments.smoke else 7)
    for case in cases(smoke=arguments.smoke):
        rows.append(
            {"family": family, "case": case.title, "flags": case.flags}
            | _means([run for run in runs if run.case == case.name])
            | bytes_of(configs[case.name])
            | timings[case.name]
        )
    return rows


def _means(runs: Sequence[Run]) -> dict[str, float]:
    """Of the figures over seeds.

    Raises:
        ValueError: a run diverged.
    """
    figures = [run.figures for run in runs if run.figures is not None]
    if len(figures) < len(runs):
        raise ValueError(f"a run of {runs[0].case} diverged: {runs}")
    means = {k: statistics.fmean(f[k] for f in figures) for k in figures[0]}
    rewards = [f["true_reward"] for f in figures]
    return means | {"true_reward_least": min(rewards), "seeds": len(runs)}


def markdown(rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Two tables: results and costs."""
    learned = [
        "| family | trained | true reward | reward model | KL to SFT (nats) | length |",
        "|---|---|--:|--:|--:|--:|",
    ]
    cost = [
        "| family | trained | parameters trained | + gradients + optimizer | frozen | "
        "update (s) | response tokens / s of update | step (s) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = f"| {row['family']} | {row['case']} |"
        learned.append(
            f"{name} {row['true_reward']:.2f} | {row['proxy_reward']:.2f} | "
            f"{row['kl']:.2f} | {row['length']:.1f} |"
        )
        if "trained_bytes" in row:
            cost.append(
                f"{name} {_mb(row['trained_bytes'])} | "
                f"{_mb(row['gradient_bytes'] + row['optimizer_bytes'])} | "
                f"{_mb(row['frozen_bytes'])} | {row['update_s']:.2f} | "
                f"{row['update_tokens_per_s']:.0f} | {row['step_s']:.2f} |"
            )
    about = (
        f"{machine['processor']}, {machine['cores']} cores, jax "
        f"{machine['versions']['jax']}; `{machine['command']}`"
    )
    return "\n".join([*learned, "", *cost, "", about, ""])


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def parse_arguments() -> argparse.Namespace:
    """Validated flags; defaults depend on --smoke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("runs/lora"), metavar="DIR")
    add("--families", nargs="+", choices=["gpt2", "llama"])
    add("--seeds", type=int, default=1, metavar="N", help="PPO seeds 0 to N − 1")
    add("--updates", type=int, metavar="N", help="updates per run; default 40")
    add("--batch-size", type=int, metavar="N", help="responses per update; default 64")
    add("--jobs", type=int, default=2, metavar="N", help="parallel runs; default 2")
    add("--smoke", action="store_true", help="quick test, a minute")
    given = vars(parser.parse_args())
    sizes = SMOKE if given["smoke"] else FULL
    given |= {name: sizes[name] for name in sizes if given[name] is None}
    for name in ("seeds", "jobs", "updates"):
        if given[name] < 1:
            parser.error(f"--{name} {given[name]} must be at least 1")
    return argparse.Namespace(**given)


def main() -> None:
    """Trains missing models and runs, and writes the results."""
    arguments = parse_arguments()
    # Several processes share a device: none may preallocate all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    quieten_libraries()
    use_compilation_cache()
    root = arguments.work_dir / "smoke" if arguments.smoke else arguments.work_dir
    machine = timing.machine()
    timing.print_machine(machine)
    rows = []
    for family in arguments.families:
        rows += measure(arguments, root, family)
    table = markdown(rows, machine)
    write_atomic(root / "lora.md", table)
    print(f"\n{table}\nWritten: {root}/lora.md")
    timing.print_result({"benchmark": "lora", "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
