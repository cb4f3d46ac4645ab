"""PPO, GRPO and RLOO on arithmetic, with the same number of sampled tokens.

    python benchmarks/critic_free.py                              # three seeds
    python benchmarks/critic_free.py --methods ppo dr_grpo --seeds 5
    python benchmarks/critic_free.py --methods grpo --form r1-zero --updates 300

The task is that of `rlhf-jax arithmetic`: a small model is trained on error-prone
demonstrations, then rewarded for correct answers. Each seed has its own problems and
SFT model, from which every method starts; all sample the same number of responses.

The work directory gets `critic_free.md` (a table), `critic_free.png` (learning curves
with standard deviations) and `critic_free.jsonl` (a line per run). Running the same
command again, also with more methods or seeds, resumes. It takes about 15 minutes on 2
otherwise idle cores.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import timing
from critic_free_report import Curve, draw, markdown, summarize

from rlhf_jax.cli import quieten_libraries, use_compilation_cache
from rlhf_jax.config.demos import ArithmeticConfig, Method
from rlhf_jax.demos import arithmetic
from rlhf_jax.run.interrupt import Interrupted
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory, write_atomic

NAME = "critic_free"
FORMS = ("reasoning", "r1-zero")  # of which the curves tell how well they are kept
SMOKE: dict[str, Any] = {
    "demonstrations": 200,
    "sft_steps": 5,
    "updates": 2,
    "batch_size": 16,
    "eval_problems": 8,
}


def make_config(arguments: argparse.Namespace, method: str, seed: int) -> Any:
    """One cell: a method with a seed, in the directory of the seed.

    Raises:
        ValueError: the method is incompatible with the sizes.
    """
    run_dir = arguments.root / f"{arguments.form}-{seed}"
    config = ArithmeticConfig(
        run_dir=str(run_dir),
        form=arguments.form,
        method=method,  # pyright: ignore[reportArgumentType]  # argparse checked it
        seed=seed,
        quiet=True,
    )
    if arguments.updates is not None:
        config = dataclasses.replace(config, updates=arguments.updates)
    if arguments.smoke:
        config = dataclasses.replace(config, **SMOKE)
    config.validate()
    arithmetic.policy_config(config, run_dir).validate()
    return config


def run_cell(config: ArithmeticConfig) -> Curve:
    """The learning curve of one cell; existing results are kept."""
    root = Path(config.run_dir)
    settings = _settings(config)
    result = root / config.method / "result.json"
    if result.exists():
        found = json.loads(result.read_text("utf-8"))
        if found["settings"] != settings:
            raise ValueError(
                f"{result.parent} was run with other options; remove it, or choose "
                "another --work-dir"
            )
        return Curve(**found["curve"])
    heading(f"{config.method}, {config.form}, seed {config.seed}")
    train_base(config, root)
    curve = read_curve(config, arithmetic.reinforce(config, root))
    found = {
        "curve": dataclasses.asdict(curve),
        "settings": settings,
        "machine": timing.machine(),
    }
    write_atomic(result, json.dumps(found) + "\n")
    return curve


def _settings(config: ArithmeticConfig) -> dict[str, Any]:
    """Everything that the outcome depends on."""
    values = dataclasses.asdict(config)
    return {name: values[name] for name in values if name not in ("run_dir", "quiet")}


def train_base(config: ArithmeticConfig, root: Path) -> None:
    """Data and the model that every method starts from, once."""
    if (root / "sft" / "model" / "config.json").exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    arithmetic.imitate(config, root)


def read_curve(config: ArithmeticConfig, run: RunDirectory) -> Curve:
    """The evaluations of a run, by the tokens sampled until then."""
    rows = read_metrics(run.metrics)
    points = [row for row in rows if "eval/pass_at_1" in row]
    seconds = [row.get("time/step_seconds", 0.0) for row in rows if row["step"] > 0]
    return Curve(
        method=config.method,
        seed=config.seed,
        tokens=[row.get("rollout/tokens", 0) for row in points],
        pass_at_1=[row["eval/pass_at_1"] for row in points],
        pass_at_4=[row["eval/pass_at_4"] for row in points],
        form_kept=[row["eval/reward/reasoning_format"] for row in points],
        length=[row["eval/length_mean"] for row in points],
        seconds=sum(seconds),
    )


def publish(curves: Sequence[Curve], arguments: argparse.Namespace) -> None:
    """Writes table, figure and lines; prints the table, and the summaries as JSON."""
    root, machine = arguments.root, timing.machine()
    summaries = summarize(curves)
    title = (
        f"Verifiable rewards: arithmetic, form {arguments.form}, {arguments.seeds} "
        f"seed{'s' * (arguments.seeds > 1)}"
    )
    table = markdown(summaries, title=title, machine=machine)
    write_atomic(root / f"{NAME}.md", table)
    lines = [json.dumps(dataclasses.asdict(curve)) + "\n" for curve in curves]
    write_atomic(root / f"{NAME}.jsonl", "".join(lines))
    draw(curves, root / f"{NAME}.png", title=title)
    print(f"\n{table}\nWritten: {root}/{NAME}.md, .png and .jsonl")
    timing.print_result(
        {
            "benchmark": NAME,
            "machine": machine,
            "form": arguments.form,
            "methods": [dataclasses.asdict(summary) for summary in summaries],
        }
    )


def make_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--work-dir",
        type=Path,
        default=Path("runs/critic_free"),
        metavar="DIR",
        help="models, runs and results; default runs/critic_free",
    )
    add(
        "--methods",
        nargs="+",
        choices=get_args(Method),
        default=["ppo", "grpo", "rloo"],
        metavar="METHOD",
        help=f"some of {', '.join(get_args(Method))}; default: ppo grpo rloo",
    )
    add("--form", choices=FORMS, default="reasoning", help="of the task")
    add("--seeds", type=int, default=3, metavar="N", help="0 to N − 1; default 3")
    add("--updates", type=int, metavar="N", help="per run; default: the command's")
    add(
        "--smoke",
        action="store_true",
        help="quick test, under a minute: five steps, two updates",
    )
    return parser


def main() -> None:
    """Runs missing cells and writes the results."""
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds} must be at least 1")
    if arguments.updates is not None and arguments.updates < 1:
        parser.error(f"--updates {arguments.updates} must be at least 1")
    arguments.root = arguments.work_dir / ("smoke" if arguments.smoke else "")
    quieten_libraries()
    use_compilation_cache()
    try:
        cells = [
            make_config(arguments, method, seed)
            for seed in range(arguments.seeds)
            for method in dict.fromkeys(arguments.methods)
        ]
        timing.print_machine(timing.machine())
        curves = [run_cell(config) for config in cells]
    except ValueError as error:
        parser.error(str(error))
    except (KeyboardInterrupt, Interrupted):
        sys.exit("Stopped. Run the same command again to resume.")
    publish(curves, arguments)


if __name__ == "__main__":
    main()
