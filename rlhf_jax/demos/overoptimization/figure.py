"""The figure: proxy and true reward over √KL, ensembles, early stopping."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.config.demos import OveroptimizationConfig
from rlhf_jax.demos.overoptimization.curves import Curve, best_before, stopping_point

if TYPE_CHECKING:  # Matplotlib is slow to import
    from matplotlib.axes import Axes

SCORED_BY = {
    "single": "one reward model",
    "mean": "mean of {models}",
    "worst": "worst of {models}",
    "mean-minus-std": "mean − {penalty:g}·std of {models}",
}
SCORED_BY_COLORS = {
    "single": "#c2410c",
    "mean": "#a16207",
    "worst": "#0369a1",
    "mean-minus-std": "#15803d",
}
WATCHED_COLORS = {"true": "#7c3aed", "others": "#0f766e"}
DISTANCE = "√KL to the SFT model  (√nats per response)"
LEGEND = (
    "Solid: true reward, never seen in training. Dashed: the optimized proxy. "
    "▼ the true reward turns down: its last\nthree points lie more than four standard "
    "errors below. Bands: ± 1 standard error. KL of best-of-n is at most\n"
    "log n − (n − 1)/n, drawn as if equal. Held-out prompts throughout."
)


def draw(
    curves: Sequence[Curve], path: Path, *, config: OveroptimizationConfig
) -> None:
    """A PNG of four panels: PPO by β, best-of-n, ensembles, early stopping."""
    import matplotlib
    from matplotlib.figure import Figure

    ppo = [curve for curve in curves if curve.method == "ppo"]
    singles = [curve for curve in ppo if curve.scored_by == "single"]
    compared = [curve for curve in ppo if curve.beta == config.ensemble_beta]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(11, 8.6), layout="constrained")
        (by_beta, by_n), (ensembles, stopping) = figure.subplots(2, 2)
        _draw_betas(by_beta, singles, curves)
        _draw_best_of_n(by_n, curves, config)
        _draw_ensembles(ensembles, compared, config)
        _draw_stopping(stopping, compared[0], config.patience)
        for axes in (by_beta, by_n, ensembles, stopping):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e2e8f0", lw=0.8)
            axes.set_axisbelow(True)
            axes.set_ylabel("reward")
        figure.suptitle(
            f"Overoptimization of a reward model from {config.pairs:,} pairs",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        figure.supxlabel(LEGEND, x=0.01, ha="left", fontsize=7.5, color="#64748b")
        figure.savefig(path, dpi=150)


def _draw_betas(
    axes: "Axes", singles: Sequence[Curve], curves: Sequence[Curve]
) -> None:
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    ordered = sorted(singles, key=lambda curve: curve.beta or 0.0)
    for number, curve in enumerate(ordered):
        color = shades(0.85 * number / max(len(ordered) - 1, 1))
        _draw_curve(axes, curve, color, f"β = {curve.beta:g}")
    for curve in curves:
        if curve.method == "best-of-n" and curve.scored_by == "single":
            axes.plot(
                curve.root_kl, curve.true, color="#94a3b8", lw=2.5, label="best of n"
            )
    _titled(axes, "PPO against one reward model")


def _draw_best_of_n(
    axes: "Axes", curves: Sequence[Curve], config: OveroptimizationConfig
) -> None:
    for curve in curves:
        if curve.method != "best-of-n":
            continue
        color = SCORED_BY_COLORS[curve.scored_by]
        _draw_curve(axes, curve, color, _scored_by(curve, config))
        if curve.scored_by == "single":
            for n, x, y in zip(curve.at, curve.root_kl, curve.true, strict=True):
                axes.annotate(
                    f"n={n}" if n == 1 else str(n),
                    (x, y),
                    xytext=(0, -12),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color="#64748b",
                )
    _titled(axes, "Best of n")


def _draw_ensembles(
    axes: "Axes", compared: Sequence[Curve], config: OveroptimizationConfig
) -> None:
    for curve in compared:
        color = SCORED_BY_COLORS[curve.scored_by]
        _draw_curve(axes, curve, color, _scored_by(curve, config))
    _titled(axes, f"PPO against ensembles, β = {config.ensemble_beta:g}")


def _draw_stopping(axes: "Axes", curve: Curve, patience: int) -> None:
    """The metrics early stopping could watch, and where each would stop."""
    assert curve.others is not None
    axes.plot(curve.at, curve.proxy, "--", color="#475569", lw=1.2, label="proxy")
    series = {"true": ("true reward", curve.true)}
    series["others"] = ("worst of the other reward models", curve.others)
    for name, (label, values) in series.items():
        stop = stopping_point(values, patience=patience)
        kept = best_before(values, stop)
        color = WATCHED_COLORS[name]
        axes.plot(curve.at, values, "-o", color=color, ms=3, lw=1.4, label=label)
        if stop == len(values) - 1:
            continue
        axes.plot(curve.at[kept], values[kept], "*", color=color, ms=13)
        axes.axvline(
            curve.at[stop], color=color, lw=1, ls=":", label=f"stops, by the {label}"
        )
    axes.set_title(
        f"Early stopping at β = {curve.beta:g}, patience {patience}  (★ kept)",
        loc="left",
        fontsize=10,
    )
    axes.set_xlabel("PPO updates")
    axes.legend(frameon=False, fontsize=7.5)


def _draw_curve(axes: "Axes", curve: Curve, color, label: str) -> None:
    x = curve.root_kl
    axes.plot(x, curve.proxy, "--", color=color, lw=1.1, alpha=0.8)
    axes.plot(x, curve.true, "-o", color=color, ms=3, lw=1.6, label=label)
    errors = list(zip(curve.true, curve.true_error, strict=True))
    axes.fill_between(
        x,
        [true - error for true, error in errors],
        [true + error for true, error in errors],
        color=color,
        alpha=0.15,
        lw=0,
    )
    if curve.turn is not None:
        axes.plot(
            x[curve.turn],
            curve.true[curve.turn],
            "v",
            color=color,
            ms=11,
            mec="black",
            mew=0.8,
            zorder=5,
        )


def _scored_by(curve: Curve, config: OveroptimizationConfig) -> str:
    return SCORED_BY[curve.scored_by].format(
        models=config.models, penalty=config.ensemble_penalty
    )


def _titled(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(DISTANCE)
    axes.legend(frameon=False, fontsize=8)
