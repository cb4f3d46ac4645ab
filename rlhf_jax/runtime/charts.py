"""Which metrics share a chart, and the chart as inline SVG."""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # Matplotlib is slow to import, and only a report needs it
    from matplotlib.axes import Axes

Series = tuple[np.ndarray, np.ndarray]  # steps [N] int64, values [N] float64

COLORS = ("#2563eb", "#ea580c", "#0d9488", "#9333ea")
SMOOTHED_FROM = 60  # points; below that every point is worth seeing


@dataclasses.dataclass(frozen=True)
class Chart:
    """Metrics that are drawn over each other, because they share a unit.

    Attributes:
        title: what is shown.
        unit: of the vertical axis.
        lines: metric → its name in the legend.
        band: metric with the standard deviation around the first line.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    band: str | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """Charts under one heading.

    Attributes:
        title: the heading.
        groups: first parts of metric names; those without a chart appear here too.
        charts: in the order of the page.
    """

    title: str
    groups: tuple[str, ...]
    charts: tuple[Chart, ...]


SECTIONS = (
    Section(
        "Learning",
        ("train", "eval"),
        (
            Chart(
                "Loss",
                "nats",
                {"train/loss": "training data", "eval/loss": "held-out data"},
            ),
            Chart(
                "Accuracy",
                "share of 1",
                {"train/accuracy": "training data", "eval/accuracy": "held-out data"},
            ),
            Chart("Perplexity", "held-out data", {"eval/perplexity": "per token"}),
            Chart("Margin", "chosen minus rejected", {"train/margin": "mean"}),
            Chart("Score", "training data", {"train/score_mean": "mean"}),
        ),
    ),
    Section(
        "Reward",
        ("reward",),
        (
            Chart(
                "Score",
                "per answer",
                {"reward/score_mean": "mean"},
                band="reward/score_std",
            ),
            Chart(
                "Score on held-out data",
                "per answer",
                {"eval/score_mean": "mean"},
                band="eval/score_std",
            ),
            Chart("True reward", "on held-out prompts", {"eval/true_reward": "mean"}),
            Chart(
                "Shaped reward",
                "score minus KL penalty",
                {"reward/shaped_mean": "mean"},
            ),
        ),
    ),
    Section(
        "Distance from the reference",
        ("kl",),
        (
            Chart(
                "KL per answer",
                "nats",
                {"kl/sequence": "training data", "eval/kl_sequence": "held-out data"},
            ),
            Chart("KL per token", "nats", {"kl/token": "mean"}),
            Chart("KL coefficient β", "reward per nat", {"kl/coef": "β"}),
        ),
    ),
    Section(
        "Policy",
        ("policy",),
        (
            Chart("Policy loss", "clipped surrogate", {"policy/loss": "loss"}),
            Chart("Entropy", "nats per token", {"policy/entropy": "mean"}),
            Chart(
                "KL of one update",
                "nats per token",
                {"policy/approx_kl": "mean"},
            ),
            Chart(
                "Clip fractions",
                "share of tokens",
                {"policy/clip_fraction": "policy", "value/clip_fraction": "value"},
            ),
            Chart(
                "Probability ratio", "new over old, mean", {"policy/ratio_mean": "mean"}
            ),
            Chart(
                "First step of an update",
                "zero while on policy",
                {
                    "policy/first_approx_kl": "KL",
                    "policy/first_clip_fraction": "clip fraction",
                },
            ),
        ),
    ),
    Section(
        "Critic",
        ("value",),
        (
            Chart("Value loss", "squared reward", {"value/loss": "loss"}),
            Chart(
                "Explained variance",
                "1 is perfect, 0 a constant",
                {"value/explained_variance": "returns"},
            ),
            Chart(
                "Values and returns",
                "reward, mean",
                {"value/mean": "values", "value/return_mean": "returns"},
            ),
        ),
    ),
    Section(
        "Answers",
        ("response",),
        (
            Chart(
                "Length",
                "tokens, mean",
                {
                    "response/length_mean": "training data",
                    "eval/length_mean": "held-out data",
                },
            ),
            Chart(
                "Stop rate",
                "share of answers that end by themselves",
                {
                    "response/stop_rate": "training data",
                    "eval/stop_rate": "held-out data",
                },
            ),
        ),
    ),
    Section(
        "Optimizer",
        ("optim",),
        (
            Chart(
                "Gradient norm",
                "before clipping",
                {
                    "optim/grad_norm": "model",
                    "optim/actor_grad_norm": "actor",
                    "optim/critic_grad_norm": "critic",
                },
            ),
            Chart(
                "Learning rate",
                "per step",
                {
                    "optim/learning_rate": "model",
                    "optim/actor_learning_rate": "actor",
                    "optim/critic_learning_rate": "critic",
                },
            ),
        ),
    ),
    Section(
        "Speed",
        ("time",),
        (
            Chart(
                "Time per step",
                "seconds",
                {"time/step_seconds": "whole step", "time/rollout_seconds": "rollout"},
            ),
            Chart("Throughput", "tokens per second", {"time/tokens_per_second": "all"}),
        ),
    ),
)


def arrange(metrics: Sequence[str]) -> list[Section]:
    """The charts that these metrics fill; each metric is in exactly one.

    A metric that no chart of `SECTIONS` expects gets one of its own, in the section of
    its group; a group without a section gets one.
    """
    present = set(metrics)
    sections = [
        Section(section.title, section.groups, _filled(section.charts, present))
        for section in SECTIONS
    ]
    shown = {
        name
        for section in sections
        for chart in section.charts
        for name in (*chart.lines, chart.band)
    }
    for name in metrics:
        if name in shown:
            continue
        group = name.split("/")[0]
        own = Chart(name, "", {name: name})
        for i, section in enumerate(sections):
            if group in section.groups:
                charts = (*section.charts, own)
                sections[i] = dataclasses.replace(section, charts=charts)
                break
        else:
            sections.append(Section(group, (group,), (own,)))
    return [section for section in sections if section.charts]


def _filled(charts: Sequence[Chart], present: set[str]) -> tuple[Chart, ...]:
    filled = []
    for chart in charts:
        lines = {name: label for name, label in chart.lines.items() if name in present}
        band = chart.band if chart.band in present else None
        if lines:
            filled.append(dataclasses.replace(chart, lines=lines, band=band))
    return tuple(filled)


def draw(chart: Chart, series: Mapping[str, Series]) -> str:
    """The chart as an `<svg>` element without title and legend; empty if no number is.

    Args:
        chart: what to draw.
        series: metric → steps and values; values that are not finite leave gaps.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if not any(np.isfinite(series[name][1]).any() for name in chart.lines):
        return ""
    style: Any = {
        "svg.fonttype": "none",  # text stays text, in the font of the page
        "font.family": "DejaVu Sans",  # measures the text; comes with Matplotlib
        "svg.hashsalt": "".join(chart.lines),  # ids differ between charts, not calls
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.2), layout="constrained")
        axes = figure.add_subplot()
        if chart.band is not None:
            _draw_band(axes, series[next(iter(chart.lines))], series[chart.band])
        for color, name in zip(line_colors(chart), chart.lines, strict=True):
            _draw_line(axes, *series[name], color=color)
        axes.spines[:].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8, labelcolor="#64748b")
        axes.margins(x=0.02, y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.6g}"))
        axes.set_xlabel("step", fontsize=8, color="#64748b", loc="right", labelpad=1)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # These ids are the same in every chart of a page, and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", text)


def line_colors(chart: Chart) -> list[str]:
    """The colour of each line, in the order of `chart.lines`."""
    return [COLORS[i % len(COLORS)] for i in range(len(chart.lines))]


def smoothing_window(num_points: int) -> int:
    """Points averaged for the bold line of a curve; 1: the curve is drawn as it is."""
    return 1 if num_points < SMOOTHED_FROM else num_points // 30


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the `window - 1` before it, as far as there are any."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_line(
    axes: "Axes", steps: np.ndarray, values: np.ndarray, *, color: str
) -> None:
    finite = np.isfinite(values)
    window = smoothing_window(int(finite.sum()))
    values = np.where(finite, values, np.nan)
    few = finite.sum() <= 12
    if window == 1:
        axes.plot(
            steps, values, color=color, linewidth=1.6, marker="o" if few else "", ms=3.5
        )
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    smooth = trailing_mean(values[finite], window)
    axes.plot(steps[finite], smooth, color=color, linewidth=1.8)


def _draw_band(axes: "Axes", mean: Series, deviation: Series) -> None:
    deviations = dict(zip(deviation[0].tolist(), deviation[1], strict=True))
    around = np.array([deviations.get(step, np.nan) for step in mean[0].tolist()])
    finite = np.isfinite(mean[1]) & np.isfinite(around)
    steps, values, around = mean[0][finite], mean[1][finite], around[finite]
    window = smoothing_window(len(values))
    if len(values):
        values = trailing_mean(values, window)
        around = trailing_mean(around, window)
    axes.fill_between(
        steps, values - around, values + around, color=COLORS[0], alpha=0.12, lw=0
    )
