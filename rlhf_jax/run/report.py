"""The report of a run: one self-contained HTML file."""

import importlib.resources
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.files.printable import printable
from rlhf_jax.run import chart_svg, charts
from rlhf_jax.run.log_files import read_metrics, read_samples
from rlhf_jax.run.run_directory import RunDirectory

KEY_NUMBERS = {
    "eval/pass_at_1": "pass@1, held-out",
    "eval/true_reward": "True reward",
    "eval/reward/*": "Held-out *",
    "reward/score_mean": "Score",
    "eval/score_mean": "Held-out score",
    "eval/accuracy": "Held-out accuracy",
    "eval/loss": "Held-out loss",
    "train/loss": "Training loss",
    "kl/sequence": "KL per response",
    "group/no_signal": "Zero-variance groups",
    "group/score_std": "Score std within groups",
    "policy/entropy": "Entropy",
    "value/explained_variance": "Explained variance",
    "response/length_mean": "Response length",
    "response/stop_rate": "Stop rate",
    "time/tokens_per_second": "Tokens per second",
}
"""Key metrics, the most informative first; `*` as in `charts.Chart`."""

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
"""Of every page we write: a browser runs no script in it and requests nothing for it.

Text in it is escaped; this is for what escaping might miss.
"""

SAMPLES_OPEN = 6
SAMPLES_MAX = 200
STEPS_SHOWN = 5


def write_report(
    run_dir: str | Path,
    *,
    title: str | None = None,
    table: Sequence[Mapping[str, Any]] | None = None,
    notes: str | Sequence[str] | None = None,
) -> Path:
    """Writes `report.html` from the files of a run, finished or not.

    Every logged metric is in a chart. Responses of `samples.jsonl` to the same prompt
    are shown side by side, in the order of steps.

    Args:
        run_dir: the run directory.
        title: title of the page; default: the stage and the directory's name.
        table: rows of a comparison table at the top; their keys are the columns.
        notes: paragraphs above it.

    Returns:
        The path of the report. Only process 0 writes it.

    Raises:
        ValueError: if `run_dir` is not a directory or one of its files is malformed.
    """
    run = RunDirectory(Path(run_dir))
    if jax.process_index() != 0:
        return run.report
    if not run.path.is_dir():
        raise ValueError(f"run directory {run.path} does not exist; nothing to report")
    import jinja2
    import yaml

    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    samples = read_samples(run.samples) if run.samples.exists() else []
    config, launches = run.read_config(), run.read_launches()
    series = _series(rows)
    stage = launches[0]["stage"] if launches else ""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_without_controls,
    )
    environment.filters["number"] = format_number
    template = importlib.resources.files("rlhf_jax.run") / "report.html.jinja"
    compared = compare_samples(samples)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        policy=CONTENT_POLICY,
        title=title or f"{stage or 'run'}: {run.path.resolve().name}",
        facts=_facts(rows, config, launches) | _totals(series),
        notes=[notes] if isinstance(notes, str) else list(notes or ()),
        table=list(table or ()),
        columns=list(dict.fromkeys(key for row in table or () for key in row)),
        key_numbers=_key_numbers(series),
        sections=[_section(section, series) for section in charts.arrange([*series])],
        smoothed_from=chart_svg.SMOOTHED_FROM,
        compared=compared[:SAMPLES_MAX],
        num_compared=len(compared),
        samples_open=SAMPLES_OPEN,
        summaries=[_summary(name, *series[name]) for name in sorted(series)],
        launches=launches,
        config=yaml.safe_dump(config, sort_keys=False) if config else "",
    )
    write_atomic(run.report, page)
    return run.report


def compare_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The responses to each prompt at several steps.

    Several responses to one prompt in one step are distinguished by their order: the
    second ones of all steps are shown together.

    Args:
        samples: rows of `samples.jsonl`, in the order of the file.

    Returns:
        Per prompt `{"prompt": …, "order": 1, "answers": […]}`, with the order of the
        responses within a step. There are at most `STEPS_SHOWN` of them: the first, the
        last, and others evenly spaced between. Each has `step`, `response`, `numbers`.
    """
    answers: dict[tuple[str, int], list[dict[str, Any]]] = {}
    seen: dict[tuple[str, int], int] = {}
    for row in samples:
        prompt, step = row["prompt"], row["step"]
        order = seen[prompt, step] = seen.get((prompt, step), 0) + 1
        numbers = {
            name: value
            for name, value in row.items()
            if name not in ("step", "prompt", "response") and value is not None
        }
        answer = {"step": step, "response": row["response"], "numbers": numbers}
        answers.setdefault((prompt, order), []).append(answer)
    return [
        {"prompt": prompt, "order": order, "answers": _spread(found)}
        for (prompt, order), found in answers.items()
    ]


def _spread(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = min(len(answers), STEPS_SHOWN)
    places = np.linspace(0, len(answers) - 1, shown).round().astype(int)
    return [answers[place] for place in places]


def _without_controls(value: Any) -> Any:
    """Text with control characters escaped; markup and numbers as they are."""
    return printable(value, keep="\n\t") if type(value) is str else value


def format_number(value: Any) -> str:
    """A number in readable form; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _series(rows: Sequence[Mapping[str, int | float]]) -> dict[str, chart_svg.Series]:
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        name: (
            np.array([row["step"] for row in rows if name in row], np.int64),
            np.array([row[name] for row in rows if name in row], np.float64),
        )
        for name in names
    }


def _facts(
    rows: Sequence[Mapping[str, int | float]],
    config: Mapping[str, Any],
    launches: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if launches:
        facts["Stage"] = launches[0]["stage"]
    if rows:
        facts["Steps"] = len({row["step"] for row in rows})
    seconds = [row["time/step_seconds"] for row in rows if "time/step_seconds" in row]
    if seconds:
        facts["Total step time"] = format_seconds(math.fsum(seconds))
    if "seed" in config:
        facts["Seed"] = config["seed"]
    if launches:
        last = launches[-1]
        facts["Devices"] = f"{last['devices']} × {last['device_kind']}"
        if last["processes"] > 1:
            facts["Processes"] = last["processes"]
        facts["Started"] = launches[0]["started"].replace("T", " ")[:16] + " UTC"
        if len(launches) > 1:
            facts["Resumed"] = f"{len(launches) - 1} ×"
        for package in ("rlhf-jax", "jax"):
            facts[package] = last["versions"][package]
    return facts


def _totals(series: Mapping[str, chart_svg.Series]) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    if "rollout/tokens" in series:
        totals["Response tokens"] = float(series["rollout/tokens"][1][-1])
    if "reward/failures" in series:
        totals["Reward failures"] = float(series["reward/failures"][1].sum())
    return {name: round(total) for name, total in totals.items() if total > 0}


def _key_numbers(series: Mapping[str, chart_svg.Series]) -> list[dict[str, Any]]:
    return [
        {
            "label": label.replace("*", meant),
            "metric": name,
            "first": float(series[name][1][0]),
            "last": float(series[name][1][-1]),
        }
        for pattern, label in KEY_NUMBERS.items()
        for name, meant in charts.matches(pattern, [*series]).items()
    ]


def _section(
    section: charts.Section, series: Mapping[str, chart_svg.Series]
) -> dict[str, Any]:
    import markupsafe

    drawn = []
    for chart in section.charts:
        colors = chart_svg.line_colors(chart)
        labels = [
            {"label": label, "color": color, "metric": name}
            for color, (name, label) in zip(colors, chart.lines.items(), strict=True)
        ]
        if chart.band is not None:
            labels.append(
                {"label": "± 1 std", "color": f"{colors[0]}33", "metric": chart.band}
            )
        values = np.concatenate([series[name][1] for name in chart.lines])
        drawn.append(
            {
                "title": chart.title,
                "unit": chart.unit,
                "labels": labels,
                "not_finite": int((~np.isfinite(values)).sum()),
                "svg": markupsafe.Markup(chart_svg.draw(chart, series)),
            }
        )
    return {"title": section.title, "charts": drawn}


def _summary(name: str, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    return {
        "metric": name,
        "points": len(steps),
        "first": float(values[0]),
        "last": float(values[-1]),
        "lowest": float(finite.min()) if finite.size else math.nan,
        "highest": float(finite.max()) if finite.size else math.nan,
        "not_finite": len(values) - finite.size,
    }
