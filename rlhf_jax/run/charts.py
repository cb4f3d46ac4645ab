"""Which metrics share a chart, and the colours of their lines."""

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
    """Metrics that are drawn over each other, because they share a unit.

    A `*` at the end of a metric stands for a name that the run chose, or a number; one
    in a title or a legend repeats it. A title without `*` gathers all of them in one
    chart, a title with `*` gives each a chart of its own.

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
                "pass@k",
                "share of held-out prompts",
                {"eval/pass_at_*": "pass@*"},
            ),
            Chart(
                "Score",
                "per answer",
                {"reward/score_mean": "mean", "reward/greedy_mean": "greedy answers"},
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
            Chart("Reward model", "mean per answer", {"reward/model": "mean"}),
            Chart(
                "*",
                "mean per answer",
                {"reward/*": "training data", "eval/reward/*": "held-out data"},
            ),
            Chart(
                "Scores before normalization",
                "running mean",
                {"reward/normalization_mean": "mean"},
                band="reward/normalization_std",
            ),
            Chart("Failed rewards", "answers", {"reward/failures": "failures"}),
        ),
    ),
    Section(
        "Groups of answers to one prompt",
        ("group",),
        (
            Chart(
                "Reward spread",
                "standard deviation inside a group, mean",
                {"group/score_std": "mean"},
            ),
            Chart(
                "Groups without signal",
                "share with equal rewards only",
                {"group/no_signal": "share"},
            ),
            Chart(
                "What became of them",
                "groups",
                {
                    "group/resampled": "sampled again",
                    "group/kept_without_signal": "kept",
                },
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
                    "time/step_seconds": "whole step",
                    "time/rollout_seconds": "rollout",
                    "time/reward_seconds": "rewards",
                },
            ),
            Chart("Throughput", "tokens per second", {"time/tokens_per_second": "all"}),
            Chart(
                "Response tokens",
                "sampled so far",
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
    """The charts that these metrics fill; each metric is in exactly one.

    A metric that no chart of `SECTIONS` expects gets one of its own, in the section of
    its group; a group without a section gets one.
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
    """The metrics that a pattern names, each with what its `*` stands for there.

    A `*` stands for one name without "/". It takes no metric that a chart names in
    full. Numbers come in their order, other names in the order of `metrics`.
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
    """The chart with the lines that are there, or one for each name of its title."""
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
