"""The numbers behind the figure: JSON, CSV, a table for the terminal and a page."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.config.demos import OveroptimizationConfig
from rlhf_jax.demos.overoptimization.curves import Curve, best_before, stopping_point
from rlhf_jax.demos.showcase import print_table
from rlhf_jax.files.atomic import write_atomic


def summarize(curves: Sequence[Curve], *, patience: int) -> dict[str, Any]:
    """All results, as plain data for JSON."""
    return {
        "curves": [
            dataclasses.asdict(curve)
            | {
                "turning_point": None if curve.turn is None else curve.at[curve.turn],
                "early_stopping": early_stopping(curve, patience=patience),
            }
            for curve in curves
        ]
    }


def early_stopping(curve: Curve, *, patience: int) -> dict[str, dict[str, int]]:
    """Where early stopping would end a PPO run, for each watched metric.

    `stopped` is the update at which it ends, `kept` the update of the best policy until
    then. Held-out responses do not depend on the watched metric, so a stopped run is a
    prefix of the full run. The other models are only watched if the run is not trained
    on them.
    """
    if curve.others is None:
        return {}
    found, series = {}, {"true": curve.true}
    if curve.scored_by == "single":
        series["other models"] = curve.others
    for watched, values in series.items():
        stop = stopping_point(values, patience=patience)
        kept = best_before(values, stop)
        found[watched] = {"stopped": curve.at[stop], "kept": curve.at[kept]}
    return found


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
    """One line per point of a curve."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("at", "kl", "proxy", "true", "true_error", "others")
    writer.writerow(["curve", "method", "scored_by", "beta", *columns])
    for curve in curves:
        which = [curve.name, curve.method, curve.scored_by, curve.beta]
        others = curve.others or [None] * len(curve.at)
        points = zip(
            curve.at,
            curve.kl,
            curve.proxy,
            curve.true,
            curve.true_error,
            others,
            strict=True,
        )
        writer.writerows([*which, *point] for point in points)
    write_atomic(path, text.getvalue())


def table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row per curve: the end, the best true reward, and where it turned."""
    rows = []
    for curve in summary["curves"]:
        of_n = curve["method"] == "best-of-n"
        unit = "n" if of_n else "update"
        best = max(range(len(curve["at"])), key=curve["true"].__getitem__)
        turn = curve["turning_point"]
        rows.append(
            {
                "optimised": curve["name"],
                # For best-of-n, a bound.
                "KL at the end": "≤ " * of_n + _number(curve["kl"][-1]),
                "proxy at the end": _number(curve["proxy"][-1]),
                "true at the end": _number(curve["true"][-1]),
                "best true": f"{_number(curve['true'][best])} ({unit} "
                f"{curve['at'][best]})",
                "turns down": "no" if turn is None else f"{unit} {turn}",
            }
        )
    return rows


def stopping_table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row per run that early stopping would end, with the policy it would keep."""
    rows = []
    for curve in summary["curves"]:
        true_at = dict(zip(curve["at"], curve["true"], strict=True))
        for watched, found in curve["early_stopping"].items():
            if found["stopped"] == curve["at"][-1]:
                continue
            rows.append(
                {
                    "run": curve["name"],
                    "watched": watched,
                    "stopped at": str(found["stopped"]),
                    "kept": str(found["kept"]),
                    "its true reward": _number(true_at[found["kept"]]),
                    "true at the end": _number(curve["true"][-1]),
                }
            )
    return rows


def write_markdown(
    path: Path, summary: dict[str, Any], *, config: OveroptimizationConfig
) -> None:
    """Writes the figure and both tables to a page."""
    parts = [
        "# Reward hacking on short reviews",
        "![Proxy and true reward over √KL](overoptimization.png)",
        f"Each of {config.models} reward models was trained on {config.pairs:,} pairs "
        f"({config.ensemble_pairs}) for {config.reward_steps} steps of 64. PPO: "
        f"{config.updates} updates of {config.batch_size} responses; each point is "
        f"{config.eval_prompts} responses to held-out prompts. Best of n: "
        f"{config.best_of_samples} responses to each of {config.best_of_prompts} "
        f"prompts, KL ≤ log n − (n − 1)/n. Seed {config.seed}.",
        markdown_table(table(summary)),
        "A curve turns down if the mean of its last three points is more than four "
        "standard errors below its peak.",
    ]
    stops = stopping_table(summary)
    if stops:
        parts += [
            f"Early stopping after {config.patience} evaluations without a new best:",
            markdown_table(stops),
        ]
    write_atomic(path, "\n\n".join(parts) + "\n")


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same keys; the first column left-aligned, the others
    right-aligned."""
    columns = list(rows[0])
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)]]
    lines += [list(row.values()) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_tables(summary: dict[str, Any]) -> None:
    """Prints both tables to the terminal."""
    for rows in (table(summary), stopping_table(summary)):
        if rows:
            print_table(rows)


def _number(value: float) -> str:
    rounded = round(value, 2) + 0.0  # no −0.00
    return f"{rounded:.2f}".replace("-", "−")
