"""Summary of the learning curves of several methods: means, a table, a figure."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.run.charts import COLORS

if TYPE_CHECKING:  # Matplotlib is slow to import
    from matplotlib.axes import Axes

PANELS = {
    "pass_at_1": "pass@1 on held-out problems",
    "form_kept": "share of responses in the reasoning form",
    "length": "response length, tokens",
}
LEGEND = (
    "Thick lines: mean over seeds. Bands: ± 1 standard deviation over seeds. Thin "
    "lines: single seeds. Problems are held out; temperature 1."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """The evaluations of one run, the first before any training.

    Attributes:
        method: of reinforcement learning.
        seed: of problems, SFT model and method.
        tokens: response tokens sampled for training until then.
        pass_at_1: share of correct responses to held-out problems.
        pass_at_4: share of problems solved by one of four responses.
        form_kept: share of responses that use the reasoning form.
        length: response length, in tokens.
        seconds: time of updates, with compilation and without evaluations.
    """

    method: str
    seed: int
    tokens: list[float]
    pass_at_1: list[float]
    pass_at_4: list[float]
    form_kept: list[float]
    length: list[float]
    seconds: float

    def at(self, name: str, tokens: float | np.ndarray) -> Any:
        """A column of the curve after this many tokens, interpolated linearly."""
        return np.interp(tokens, self.tokens, vars(self)[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One method over its seeds, after the tokens that all runs have sampled.

    Attributes:
        method: which.
        seeds: in the order of the lists.
        tokens: the number, the same for every method.
        start: pass@1 before training.
        end: pass@1 after it.
        gain: points between the two, by seed.
        end_at_4: pass@4 after it.
        form_kept: share of responses in the reasoning form after training.
        length: tokens per response, before and after, means over seeds.
        seconds: time of the run.
    """

    method: str
    seeds: list[int]
    tokens: float
    start: list[float]
    end: list[float]
    gain: list[float]
    end_at_4: list[float]
    form_kept: list[float]
    length: tuple[float, float]
    seconds: list[float]


def summarize(curves: Sequence[Curve]) -> list[Summary]:
    """One summary per method, in the order in which methods come."""
    budget = min(curve.tokens[-1] for curve in curves)
    methods = dict.fromkeys(curve.method for curve in curves)
    return [
        _summary([curve for curve in curves if curve.method == method], budget)
        for method in methods
    ]


def _summary(curves: Sequence[Curve], budget: float) -> Summary:
    def column(name: str, tokens: float) -> list[float]:
        return [float(curve.at(name, tokens)) for curve in curves]

    start, end = column("pass_at_1", 0), column("pass_at_1", budget)
    return Summary(
        method=curves[0].method,
        seeds=[curve.seed for curve in curves],
        tokens=budget,
        start=start,
        end=end,
        gain=[100 * (b - a) for a, b in zip(start, end, strict=True)],
        end_at_4=column("pass_at_4", budget),
        form_kept=column("form_kept", budget),
        length=(
            statistics.fmean(column("length", 0)),
            statistics.fmean(column("length", budget)),
        ),
        seconds=[curve.seconds for curve in curves],
    )


def markdown(
    summaries: Sequence[Summary], *, title: str, machine: Mapping[str, Any]
) -> str:
    """The table, with notes and the command to reproduce it."""
    columns = ("method", "pass@1 before", "pass@1 after", "gain (points)")
    columns += (
        "least gain",
        "pass@4 after",
        "form kept",
        "length (tokens)",
        "updates (s)",
    )
    rows = [_row(summary) for summary in summaries]
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return "\n\n".join(
        [
            f"# {title}",
            table,
            f"Held-out problems, after {summaries[0].tokens:,.0f} sampled response "
            "tokens, the most that every run has sampled. ± is the standard deviation "
            "over seeds; the least gain is that of the worst seed. Seconds are update "
            "time, with compilation and without evaluations and SFT.",
            f"`{machine['command']}`  \n{machine['processor']}, {machine['cores']} "
            f"cores, {machine['device']}, load average {machine['load_average']:.1f}; "
            f"Python {machine['python']}, {versions}; commit {machine['commit']}\n",
        ]
    )


def _row(summary: Summary) -> list[str]:
    before, after = summary.length
    return [
        summary.method,
        _shown([100 * x for x in summary.start], " %"),
        _shown([100 * x for x in summary.end], " %"),
        _shown(summary.gain, sign="+"),
        f"{min(summary.gain):+.1f}".replace("-", "−"),
        _shown([100 * x for x in summary.end_at_4], " %"),
        _shown([100 * x for x in summary.form_kept], " %"),
        f"{before:.1f} → {after:.1f}",
        f"{statistics.fmean(summary.seconds):.0f}",
    ]


def _shown(values: Sequence[float], unit: str = "", sign: str = "") -> str:
    mean = round(statistics.fmean(values), 1) + 0.0  # no −0.0
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean:{sign}.1f}{spread}{unit}".replace("-", "−")


def draw(curves: Sequence[Curve], path: Path, *, title: str) -> None:
    """A PNG: pass@1, form and length over sampled tokens, a color per method."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        panels = figure.subplots(1, len(PANELS), width_ratios=(2, 1, 1))
        for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
            _draw_panel(axes, curves, name)
            axes.set_title(label, loc="left", fontsize=9)
            axes.set_xlabel("sampled response tokens, thousands")
            axes.set_ylim(bottom=0)
            if name != "length":
                axes.set_ylim(0, 1.02)
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        panels[0].legend(loc="lower right", frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(LEGEND, x=0.01, ha="left", fontsize=7.5, color="#64748b")
        figure.savefig(path, dpi=160)


def _draw_panel(axes: "Axes", curves: Sequence[Curve], name: str) -> None:
    for number, method in enumerate(dict.fromkeys(curve.method for curve in curves)):
        mine = [curve for curve in curves if curve.method == method]
        color = COLORS[number % len(COLORS)]
        for curve in mine:
            x = np.divide(curve.tokens, 1_000)
            axes.plot(x, vars(curve)[name], color=color, lw=0.7, alpha=0.45)
        grid = np.linspace(0, min(curve.tokens[-1] for curve in mine), 101)
        rows = np.stack([curve.at(name, grid) for curve in mine])
        mean, spread = rows.mean(axis=0), rows.std(axis=0, ddof=min(1, len(rows) - 1))
        axes.plot(grid / 1_000, mean, color=color, lw=2.2, label=method)
        if len(rows) > 1:
            low, high = mean - spread, mean + spread
            axes.fill_between(grid / 1_000, low, high, color=color, alpha=0.15, lw=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", lw=0.8)
    axes.set_axisbelow(True)
