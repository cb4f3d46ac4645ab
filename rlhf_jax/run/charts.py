"""The charts of a report, and their metrics and colors."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

COLORS = (
    "#2563eb",
    "#ea580c",
    "#0d9488",
    "#9333ea",
    "#db2777",
    "#65a30d",
    "#0891b2",
    "#a16207",
)


@dataclasses.dataclass(frozen=True)
class Chart:
    """Metrics with the same unit, drawn in one chart.

    A `*` at the end of a metric matches a name chosen by the run, or a number; a `*` in
    the title or legend repeats it. A title without `*` puts all matches in one chart, a
    title with `*` gives each its own.

    Attributes:
        title: title of the chart.
        unit: unit of the vertical axis.
        lines: metric → name in the legend.
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
        groups: first parts of metric names, also of metrics without a chart.
        charts: charts in the order of the page.
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
                "fraction",
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
                "pass@k",
                "share of held-out prompts",
                {"eval/pass_at_*": "pass@*"},
            ),
            Chart(
                "Score",
                "per response",
                {"reward/score_mean": "mean", "reward/greedy_mean": "greedy responses"},
                band="reward/score_std",
            ),
            Chart(
                "Held-out score",
                "per response",
                {"eval/score_mean": "mean"},
                band="eval/score_std",
            ),
            Chart("True reward", "on held-out prompts", {"eval/true_reward": "mean"}),
            Chart(
                "Shaped reward",
                "score minus KL penalty",
                {"reward/shaped_mean": "mean"},
            ),
            Chart("Reward model", "mean per response", {"reward/model": "mean"}),
            Chart(
                "*",
                "mean per response",
                {"reward/*": "training data", "eval/reward/*": "held-out data"},
            ),
            Chart(
                "Scores before normalization",
                "running mean",
                {"reward/normalization_mean": "mean"},
                band="reward/normalization_std",
            ),
            Chart("Reward failures", "responses", {"reward/failures": "failures"}),
        ),
    ),
    Section(
        "Groups",
        ("group",),
        (
            Chart(
                "Score standard deviation",
                "within groups, mean",
                {"group/score_std": "mean"},
            ),
            Chart(
                "Zero-variance groups",
                "share of groups",
                {"group/no_signal": "share"},
            ),
            Chart(
                "Resampling",
                "groups",
                {
                    "group/resampled": "resampled",
                    "group/kept_without_signal": "kept with zero variance",
                },
            ),
        ),
    ),
    Section(
        "Responses",
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
                "share of responses with a stop token",
                {
                    "response/stop_rate": "training data",
                    "eval/stop_rate": "held-out data",
                },
            ),
            Chart(
                "Distinct responses",
                "share of a batch",
                {"response/distinct": "training data"},
            ),
        ),
    ),
    Section(
        "KL to the reference",
        ("kl",),
        (
            Chart(
                "KL per response",
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
                "KL per update",
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
                "0 if on-policy",
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
        ("time", "rollout"),
        (
            Chart(
                "Time per step",
                "seconds",
                {
                    "time/step_seconds": "total",
                    "time/rollout_seconds": "rollout",
                    "time/reward_seconds": "rewards",
                },
            ),
            Chart("Throughput", "tokens per second", {"time/tokens_per_second": "all"}),
            Chart(
                "Response tokens",
                "total",
                {"rollout/tokens": "sampled"},
            ),
        ),
    ),
)


DECLARED = frozenset(
    name
    for section in SECTIONS
    for chart in section.charts
    for name in (*chart.lines, chart.band)
)


def arrange(metrics: Sequence[str]) -> list[Section]:
    """Charts of these metrics; each metric is in exactly one.

    A metric without a chart in `SECTIONS` gets its own, in the section of its group; a
    group without a section gets one.
    """
    sections = [
        Section(
            section.title,
            section.groups,
            tuple(one for chart in section.charts for one in _filled(chart, metrics)),
        )
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


def matches(pattern: str, metrics: Sequence[str]) -> dict[str, str]:
    """Metrics that match a pattern, each with the text matched by its `*`.

    A `*` matches one name without "/", but no metric that a chart names in full.
    Numbers are sorted; other names are in the order of `metrics`.
    """
    if not pattern.endswith("*"):
        return {pattern: ""} if pattern in metrics else {}
    start = pattern[:-1]
    found = {
        name: name[len(start) :]
        for name in metrics
        if re.fullmatch(re.escape(start) + "[^/]+", name) and name not in DECLARED
    }
    order = {name: int(end) if end.isdecimal() else 0 for name, end in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


def _filled(chart: Chart, metrics: Sequence[str]) -> list[Chart]:
    """The chart with its available lines, or one chart per name in its title."""
    charts: dict[str, dict[str, str]] = {}
    for pattern, label in chart.lines.items():
        for name, meant in matches(pattern, metrics).items():
            lines = charts.setdefault(chart.title.replace("*", meant), {})
            lines[name] = label.replace("*", meant)
    around = next(iter(chart.lines))
    band = chart.band if {chart.band, around} <= {*metrics} else None
    return [
        dataclasses.replace(chart, title=title, lines=lines, band=band)
        for title, lines in charts.items()
    ]
