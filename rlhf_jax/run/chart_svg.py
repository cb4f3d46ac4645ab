"""A chart as inline SVG."""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.files.printable import printable
from rlhf_jax.run.charts import COLORS, Chart

if TYPE_CHECKING:  # Matplotlib is slow to import, and only a report needs it
    from matplotlib.axes import Axes

Series = tuple[np.ndarray, np.ndarray]  # steps [N] int64, values [N] float64

SMOOTHED_FROM = 60  # points; shorter curves are not smoothed


def draw(chart: Chart, series: Mapping[str, Series]) -> str:
    """The chart as an `<svg>` element without title and legend; empty without numbers.

    Args:
        chart: chart to draw.
        series: metric → steps and values; non-finite values leave gaps.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if not any(np.isfinite(series[name][1]).any() for name in chart.lines):
        return ""
    style: Any = {
        "svg.fonttype": "none",  # text stays text, in the font of the page
        "font.family": "DejaVu Sans",  # measures the text; comes with Matplotlib
        # Ids differ between charts, not calls. Lone surrogates cannot be hashed.
        "svg.hashsalt": printable("".join(chart.lines)),
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
    """The color of each line, in the order of `chart.lines`."""
    return [COLORS[i % len(COLORS)] for i in range(len(chart.lines))]


def smoothing_window(num_points: int) -> int:
    """Points averaged for the bold line of a curve; 1: no smoothing."""
    return 1 if num_points < SMOOTHED_FROM else num_points // 30


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and up to `window - 1` before it."""
    # Sums of differences: those of a constant are exactly zero, without rounding.
    sums = np.cumsum(np.concatenate([np.zeros(1), values - values[0]]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return values[0] + (sums[ends] - sums[starts]) / (ends - starts)


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
