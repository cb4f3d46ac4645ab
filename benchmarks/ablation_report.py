"""Summary of an ablation: means, differences, a table and a plot."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_cases import DEFAULT, Case

from rlhf_jax.run.charts import COLORS

if TYPE_CHECKING:  # slow to import, and workers do not draw
    from matplotlib.axes import Axes

CONFIDENCE = 0.95
LEGEND = (
    "Dots are seeds, diamonds their means; line and band are the default ± its "
    "standard deviation.\nBold cases differ from it significantly in true reward "
    "(paired by seed, 95 %)."
)

Figures = Mapping[str, float]
"""true_reward, proxy_reward, kl (nats per response), length (tokens), stop_rate and
wall_seconds of one trained policy, means over held-out prompts"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One case with one seed; without figures if it diverged."""

    case: str
    seed: int
    figures: Figures | None
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean over seeds, and standard deviation (ddof 1) if there are several."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), std=std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One case over its seeds.

    Attributes:
        case: the case.
        seeds: seeds that did not diverge.
        diverged: seeds that diverged.
        figures: as in `Figures`.
        points: true reward and KL by seed, in the order of `seeds`.
        gain: true reward minus the default's with the same seed, mean over seeds; None
            for the default, and without common seeds.
        gain_error: standard error of `gain`; None for fewer than two seeds.
        clear: the difference is significant at 95 %, by Student's t.
    """

    case: Case
    seeds: list[int]
    diverged: list[int]
    figures: dict[str, Spread]
    points: dict[str, list[float]]
    gain: float | None
    gain_error: float | None
    clear: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        case = {"name": self.case.name, "flags": self.case.shown_flags}
        return values | {"case": case}


def summarize(cases: Sequence[Case], runs: Sequence[Run]) -> list[Summary]:
    """The default first, then the others by decreasing true reward."""
    by_case = {case.name: {} for case in cases}
    for run in runs:
        by_case[run.case][run.seed] = run.figures
    default = by_case[DEFAULT.name]
    summaries = [_summary(case, by_case[case.name], default) for case in cases]

    def order(summary: Summary) -> tuple[bool, float]:
        reward = summary.figures.get("true_reward")
        return summary.case != DEFAULT, math.inf if reward is None else -reward.mean

    return sorted(summaries, key=order)


def _summary(
    case: Case,
    by_seed: Mapping[int, Figures | None],
    default: Mapping[int, Figures | None],
) -> Summary:
    found = {seed: by_seed[seed] for seed in sorted(by_seed)}
    sound = {seed: figures for seed, figures in found.items() if figures is not None}
    columns = {
        name: [figures[name] for figures in sound.values()]
        for name in (next(iter(sound.values())) if sound else ())
    }
    gain, error, clear = None, None, False
    if case != DEFAULT:
        gain, error, clear = _paired(sound, default)
    return Summary(
        case=case,
        seeds=list(sound),
        diverged=[seed for seed in found if seed not in sound],
        figures={name: Spread.of(values) for name, values in columns.items()},
        points={name: columns.get(name, []) for name in ("true_reward", "kl")},
        gain=gain,
        gain_error=error,
        clear=clear,
    )


def _paired(
    sound: Mapping[int, Figures], default: Mapping[int, Figures | None]
) -> tuple[float | None, float | None, bool]:
    """Difference in true reward on common seeds, its standard error, if it is clear."""
    differences = [
        figures["true_reward"] - other["true_reward"]
        for seed, figures in sound.items()
        if (other := default.get(seed)) is not None
    ]
    if not differences:
        return None, None, False
    spread = Spread.of(differences)
    if spread.std is None:
        return spread.mean, None, False
    error = spread.std / math.sqrt(len(differences))
    return spread.mean, error, abs(spread.mean) > critical(len(differences)) * error


def critical(num_seeds: int) -> float:
    """Standard errors beyond which a difference over this many seeds is `clear`."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1))


def markdown(
    summaries: Sequence[Summary],
    sft: Figures,
    *,
    title: str,
    machine: Mapping[str, Any],
    num_seeds: int,
) -> str:
    """The table, with notes and the command to reproduce it."""
    columns = ("case", "flags", "true reward", "− default", "proxy reward")
    columns += ("KL (nats)", "length (tokens)", "stop rate", "wall (s)")
    rows = [_sft_row(sft), *map(_row, summaries)]
    lines = [columns, ["---", "---", *["--:"] * (len(columns) - 2)], *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return "\n\n".join(
        [
            f"# {title}",
            table,
            _note(summaries, num_seeds),
            f"`{machine['command']}`  \n{machine['processor']}, {machine['cores']} "
            f"cores, {machine['device']}; Python {machine['python']}, {versions}; "
            f"commit {machine['commit']}\n",
        ]
    )


def _note(summaries: Sequence[Summary], num_seeds: int) -> str:
    text = (
        "± is the standard deviation over seeds; in the column “− default” it is the "
        "standard error of the mean difference, paired by seed. Seeds affect only PPO: "
        "all runs share one SFT model and one reward model. Wall time is the median "
        "update × updates, without compilation, on one worker."
    )
    if num_seeds < 2:
        return text + " One seed gives no standard error."
    compared = sum(summary.gain_error is not None for summary in summaries)
    return (
        f"{text} Bold differences are more than {critical(num_seeds):.1f} standard "
        f"errors from 0 (Student's t, 95 %, {num_seeds} seeds); of {compared} cases "
        f"{compared * (1 - CONFIDENCE):.2g} are expected to be by chance."
    )


def _sft_row(sft: Figures) -> list[str]:
    return [
        "*SFT, before PPO*",
        "",
        _shown(sft["true_reward"], None),
        "",
        _shown(sft["proxy_reward"], None),
        _shown(sft["kl"], None),
        f"{sft['length']:.1f}",
        f"{sft['stop_rate']:.3f}",
        "",
    ]


def _row(summary: Summary) -> list[str]:
    flags = f"`{summary.case.shown_flags}`" if summary.case.shown_flags else ""
    if not summary.figures:
        return [_name(summary), flags, *["–"] * 7]
    figures = summary.figures
    shown = {key: _shown(figures[key].mean, figures[key].std) for key in figures}
    return [
        _name(summary),
        flags,
        shown["true_reward"],
        _gain(summary),
        shown["proxy_reward"],
        shown["kl"],
        f"{figures['length'].mean:.1f}",
        f"{figures['stop_rate'].mean:.3f}",
        f"{figures['wall_seconds'].mean:.0f}",
    ]


def _name(summary: Summary) -> str:
    if not summary.diverged:
        return summary.case.title
    count = len(summary.diverged) + len(summary.seeds)
    return f"{summary.case.title} (diverged: {len(summary.diverged)} of {count})"


def _shown(mean: float, spread: float | None, sign: str = "") -> str:
    rounded = round(mean, 2) + 0.0  # no −0.00
    text = f"{rounded:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")
    return text.replace("-", "−")


def _gain(summary: Summary) -> str:
    if summary.gain is None:
        return ""
    text = _shown(summary.gain, summary.gain_error, sign="+")
    return f"**{text}**" if summary.clear else text


def draw(summaries: Sequence[Summary], path: Path, *, title: str) -> None:
    """A PNG with a row per case: seeds and mean of true reward, and of KL."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(9.6, 1.5 + 0.3 * len(summaries)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _draw_panel(left, summaries, "true_reward", COLORS[0])
        left.set_xlabel("true reward on held-out prompts  →  better")
        _draw_panel(right, summaries, "kl", COLORS[1])
        right.set_xlabel("KL to the SFT model, nats per response")
        left.set_yticks(range(len(summaries)), list(map(_name, summaries)))
        left.set_ylim(len(summaries) - 0.5, -0.5)  # the first row at the top
        for label, summary in zip(left.get_yticklabels(), summaries, strict=True):
            emphasised = summary.clear or summary.case == DEFAULT
            label.set_fontweight("bold" if emphasised else "normal")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(LEGEND, x=0.01, ha="left", fontsize=7.5, color="#64748b")
        figure.savefig(path, dpi=160)


def _draw_panel(
    axes: "Axes", summaries: Sequence[Summary], name: str, color: str
) -> None:
    for y, summary in enumerate(summaries):
        values = summary.points[name]
        axes.plot(values, [y] * len(values), "o", color=color, alpha=0.35, ms=5, mew=0)
        if not values:
            continue
        axes.plot(statistics.fmean(values), y, "D", color=color, ms=6)
        if summary.case == DEFAULT:
            spread = summary.figures[name]
            width = spread.std or 0.0
            band = (spread.mean - width, spread.mean + width)
            axes.axvspan(*band, color="#94a3b8", alpha=0.25, lw=0, zorder=0)
            axes.axvline(spread.mean, color="#475569", lw=1, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#e2e8f0", lw=0.8)
    axes.set_axisbelow(True)
