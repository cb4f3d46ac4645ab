"""Every metric has a place in exactly one chart."""

import pytest

from rlhf_jax.run import charts
from rlhf_jax.run.charts import arrange, matches


def drawn_metrics(sections):
    return [
        name
        for section in sections
        for chart in section.charts
        for name in (*chart.lines, *([chart.band] if chart.band else []))
    ]


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        ["train/loss", "eval/loss", "train/accuracy"],
        ["reward/score_mean", "reward/score_std", "policy/loss", "value/loss"],
        ["reward/score_std", "policy/unheard_of", "eval/f1"],  # a band without its line
        ["reward/score_std", "reward/greedy_mean"],
        ["mine/a", "other/b/c", "mine/d", "alone"],
        ["reward/f", "reward/f/g", "eval/reward/f", "eval/reward/g", "reward/"],
        ["eval/pass_at_1", "eval/pass_at_", "eval/pass_at_1/x", "reward/score_mean"],
        [
            name
            for section in charts.SECTIONS
            for chart in section.charts
            for name in chart.lines
            if "*" not in name
        ],
    ],
)
def test_every_metric_is_in_exactly_one_chart(metrics):
    sections = arrange(metrics)
    assert sorted(drawn_metrics(sections)) == sorted(metrics)
    assert all(section.charts for section in sections)


def test_unknown_metrics_join_their_group():
    titles = {
        section.title: [chart.title for chart in section.charts]
        for section in arrange(["mine/b", "kl/max", "mine/a", "kl/token"])
    }
    assert titles == {
        "KL to the reference": ["KL per token", "kl/max"],
        "mine": ["mine/b", "mine/a"],
    }


def titles_and_lines(metrics, section):
    (found,) = [one for one in arrange(metrics) if one.title == section]
    return {chart.title: dict(chart.lines) for chart in found.charts}


def test_pass_at_k_is_one_chart_in_the_order_of_k():
    metrics = [f"eval/pass_at_{k}" for k in (16, 1, 2, 8, 4)]
    charted = titles_and_lines(metrics, "Reward")
    assert list(charted) == ["pass@k"]
    assert list(charted["pass@k"].items()) == [
        ("eval/pass_at_1", "pass@1"),
        ("eval/pass_at_2", "pass@2"),
        ("eval/pass_at_4", "pass@4"),
        ("eval/pass_at_8", "pass@8"),
        ("eval/pass_at_16", "pass@16"),
    ]


def test_each_reward_function_has_a_chart_of_training_and_held_out_data():
    charted = titles_and_lines(
        [
            "reward/score_mean",
            "reward/score_std",
            "reward/zebra",
            "reward/answer.v2",
            "reward/failures",
            "eval/reward/truth",
            "eval/reward/zebra",
        ],
        "Reward",
    )
    assert charted == {
        "Score": {"reward/score_mean": "mean"},
        "zebra": {
            "reward/zebra": "training data",
            "eval/reward/zebra": "held-out data",
        },
        "answer.v2": {"reward/answer.v2": "training data"},
        "truth": {"eval/reward/truth": "held-out data"},
        "Reward failures": {"reward/failures": "failures"},
    }
    # As the run names them, not by the alphabet.
    assert list(charted)[1:4] == ["zebra", "answer.v2", "truth"]


def test_a_band_belongs_to_the_first_line_only():
    deviation, greedy = "reward/score_std", "reward/greedy_mean"
    bands = {
        metrics: [
            chart.band for section in arrange(metrics) for chart in section.charts
        ]
        for metrics in ((deviation, greedy), (deviation, greedy, "reward/score_mean"))
    }
    assert [*bands.values()] == [[None, None], [deviation]]


def test_what_a_group_run_logs_has_charts_of_its_own():
    metrics = [
        "group/score_std",
        "group/no_signal",
        "group/resampled",
        "group/kept_without_signal",
        "response/length_mean",
        "eval/length_mean",
        "response/stop_rate",
        "eval/stop_rate",
    ]
    together = [
        {*chart.lines} for section in arrange(metrics) for chart in section.charts
    ]
    assert together == [
        {"group/score_std"},
        {"group/no_signal"},
        {"group/resampled", "group/kept_without_signal"},
        {"response/length_mean", "eval/length_mean"},
        {"response/stop_rate", "eval/stop_rate"},
    ]


def test_a_star_stands_for_one_name_that_no_chart_has():
    metrics = ["reward/score_std", "reward/b", "reward/a/c", "xreward/b", "reward/a"]
    assert matches("reward/*", metrics) == {"reward/b": "b", "reward/a": "a"}
    assert matches("reward/score_std", metrics) == {"reward/score_std": ""}
    assert matches("reward/c", metrics) == {}
