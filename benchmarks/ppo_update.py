"""A complete PPO update, compared with TRL 1.12's `PPOTrainer` on the same machine.

    python benchmarks/ppo_update.py            # first creates .venv-trl for TRL
    python benchmarks/ppo_update.py --no-trl   # only this library

An update is a rollout, its scoring by four separate models (actor, critic, reference,
reward model), and epochs × minibatches optimizer steps. There is no stop token: every
response has the maximum length on both sides, and both sides' optimizer steps are
counted. The two alternate, one update each. Compilation is reported separately.

Excluded on both sides: evaluation, logging, checkpoints.
"""

import argparse
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import jax
import timing
from peer import Peer, add_python_argument, make_environment
from ppo_update_jax import PHASES, JaxSide
from shape import SMOKE, Shape, add_shape_arguments, given_shape

Report = dict[str, Any]


def run_jax_alone(shape: Shape, updates: int) -> Report:
    """This library: a warm-up that compiles, then `updates` updates."""
    return _run(shape, updates, trl=None)[0]


def run_both(shape: Shape, updates: int, python: Path) -> tuple[Report, Report]:
    """A warm-up of each side, then `updates` of each in turn: A B A B …"""
    settings = {
        "shape": dataclasses.asdict(shape),
        "updates": updates + 2,  # a warm-up, and one that is never asked for
        "cpu": jax.default_backend() == "cpu",
    }
    with Peer(python, "ppo_update_trl.py", settings) as trl:
        about = trl.hello()
        ours, theirs = _run(shape, updates, trl)
    return ours, theirs | about


def _run(shape: Shape, updates: int, trl: Peer | None) -> tuple[Report, Report]:
    ours = JaxSide(shape)
    compiled = timing.Compilations()
    jax_reports = [ours.take_turn()]
    compilations, compile_s = compiled.count, compiled.seconds
    trl_reports = [] if trl is None else [trl.take_turn()]
    for _ in range(updates):
        jax_reports.append(ours.take_turn())
        if trl is not None:
            trl_reports.append(trl.take_turn())
    ours_summary = summarize(jax_reports, shape, side="rlhf_jax") | {
        "compilations": compilations,
        "compile_s": compile_s,
        "recompilations": compiled.count - compilations,
    }
    if trl is None:
        return ours_summary, {}
    return ours_summary, summarize(trl_reports, shape, side="TRL")


def summarize(reports: list[Report], shape: Shape, *, side: str) -> Report:
    """Medians over updates; the first one is a warm-up.

    Raises:
        RuntimeError: an update did not do the work it was timed for.
    """
    expected = (shape.optimizer_steps, shape.batch * shape.response)
    for report in reports:
        done = (report["optimizer_steps"], report["response_tokens"])
        if done != expected:
            raise RuntimeError(
                f"{side}: {done[0]} optimizer steps on {done[1]} response tokens in "
                f"one update; expected {expected[0]} on {expected[1]}"
            )
    first, *rest = reports
    phases = [name for name in PHASES if name in first]
    update = statistics.median(report["update_s"] for report in rest)
    return {
        "update_s": update,
        "update_min_s": min(report["update_s"] for report in rest),
        "updates": len(rest),
        "first_update_s": first["update_s"],
        **{name: statistics.median(report[name] for report in rest) for name in phases},
        "response_tokens_per_s": shape.batch * shape.response / update,
        "optimizer_steps": rest[-1]["optimizer_steps"],
        "response_tokens": rest[-1]["response_tokens"],
        "peak_rss_bytes": rest[-1]["peak_rss_bytes"],
        "device_peak_bytes": rest[-1]["device_peak_bytes"],
    }


def print_table(ours: Report, trl: Report | None) -> None:
    """A line per metric, a column per side."""
    rows = [
        ("update, median", "update_s", "{:.3f} s"),
        ("update, fastest", "update_min_s", "{:.3f} s"),
        ("  rollout", "rollout_s", "{:.3f} s"),
        ("  scoring", "score_s", "{:.3f} s"),
        ("  optimizer steps", "optimize_s", "{:.3f} s"),
        ("first update", "first_update_s", "{:.2f} s"),
        ("response tokens per s", "response_tokens_per_s", "{:,.0f}"),
        ("optimizer steps", "optimizer_steps", "{}"),
        ("response tokens", "response_tokens", "{:,}"),
        ("peak memory, MB", "peak_rss_bytes", "{:,.0f}"),
        ("peak device memory, MB", "device_peak_bytes", "{:,.0f}"),
    ]
    columns = {"rlhf_jax": ours} if trl is None else {"rlhf_jax": ours, "TRL": trl}
    print(" " * 24 + "".join(f"{name:>12}" for name in columns))
    for label, key, form in rows:
        cells = [_cell(column.get(key), key, form) for column in columns.values()]
        if any(cells):
            print(f"{label:24}" + "".join(f"{cell:>12}" for cell in cells))
    print(
        f"compiled {ours['compilations']} programs in {ours['compile_s']:.1f} s during "
        f"the first update, {ours['recompilations']} after it"
    )


def _cell(value: float | None, key: str, form: str) -> str:
    if value is None:
        return ""
    return form.format(value / 1e6 if key.endswith("_bytes") else value)


def parse_arguments() -> tuple[argparse.Namespace, Shape]:
    """Flags, and the shape they describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, Shape())
    parser.add_argument("--updates", type=int, help="timed ones; default 7, smoke 2")
    parser.add_argument("--no-trl", action="store_true", help="only this library")
    add_python_argument(parser)
    parser.add_argument(
        "--smoke", action="store_true", help="quick test with a tiny shape"
    )
    arguments = parser.parse_args()
    if arguments.updates is None:
        arguments.updates = 2 if arguments.smoke else 7
    if arguments.updates < 1:
        parser.error(f"--updates {arguments.updates} must be at least 1")
    default = SMOKE if arguments.smoke else Shape()
    return arguments, given_shape(parser, arguments, default)


def main() -> None:
    """Runs one side or both; prints a table, the ratio and a line of JSON."""
    arguments, shape = parse_arguments()
    # Read when JAX first uses a GPU: leaves memory for the other side.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    python = None
    if not arguments.no_trl:
        python = arguments.trl_python or make_environment()

    machine = timing.machine()
    timing.print_machine(machine)
    print(f"{shape}; {shape.epochs} epochs × {shape.minibatches} minibatches")
    trl, ratio = None, None
    if python is None:
        ours = run_jax_alone(shape, arguments.updates)
    else:
        ours, trl = run_both(shape, arguments.updates, python)
        ratio = trl["update_s"] / ours["update_s"]
    print_table(ours, trl)
    if trl is not None:
        versions = ", ".join(f"{k} {v}" for k, v in trl["versions"].items())
        print(f"{versions}, on {trl['device']} with {trl['threads']} threads")
        print(f"TRL takes {ratio:.2f} × as long per update (medians)")
    timing.print_result(
        {
            "benchmark": "ppo_update",
            "shape": dataclasses.asdict(shape),
            "rlhf_jax": ours,
            "trl": trl,
            "trl_over_rlhf_jax": ratio,
            "machine": machine,
        }
    )


if __name__ == "__main__":
    main()
