"""What the figure and the tables say of curves that are known."""

import pytest

from rlhf_jax.config.demos import OveroptimizationConfig
from rlhf_jax.demos.overoptimization.curves import Curve
from rlhf_jax.demos.overoptimization.figure import draw
from rlhf_jax.demos.overoptimization.results import (
    early_stopping,
    markdown_table,
    stopping_table,
    summarize,
    table,
)

CONFIG = OveroptimizationConfig(betas=(0.0, 0.1), patience=2)


def ppo_curve(beta, true, scored_by="single"):
    return Curve(
        name=f"PPO, β = {beta:g}, {scored_by}",
        method="ppo",
        scored_by=scored_by,
        beta=beta,
        at=[0, 3, 6, 9, 12, 15],
        kl=[0.0, 1.0, 4.0, 9.0, 16.0, 25.0],
        proxy=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        true=true,
        true_error=[0.1] * 6,
        others=[0.0, 1.0, 2.0, 1.5, 1.75, 1.0],
    )


HACKED = ppo_curve(0.0, [0.0, 1.5, 0.5, -1.0, -2.0, -3.0])
SOUND = ppo_curve(0.1, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
WORST = ppo_curve(0.0, [0.0, 0.5, 1.0, 1.5, 2.0, 2.25], "worst")
BEST_OF_N = Curve(
    name="best of n, single",
    method="best-of-n",
    scored_by="single",
    beta=None,
    at=[1, 2, 4],
    kl=[0.0, 0.2, 0.6],
    proxy=[0.0, 0.5, 1.0],
    true=[0.0, 0.25, 0.5],
    true_error=[0.1] * 3,
)
CURVES = [HACKED, SOUND, WORST, BEST_OF_N]


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """The four panels of the figure of `CURVES`."""
    from matplotlib.figure import Figure

    found = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        found.extend(figure.axes)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw(CURVES, tmp_path / "figure.png", config=CONFIG)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    return found


def lines(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def test_only_the_curve_that_turns_is_marked(panels):
    by_beta, by_n, ensembles, _ = panels
    for axes in (by_beta, ensembles):
        (mark,) = lines(axes, "v")
        assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1.0], [1.5])
    assert lines(by_n, "v") == []


def test_every_panel_has_its_curves_over_root_kl(panels):
    by_beta, by_n, ensembles, _ = panels
    for axes, curves in (
        (by_beta, [HACKED, SOUND]),
        (by_n, [BEST_OF_N]),
        (ensembles, [HACKED, WORST]),
    ):
        solid = lines(axes, "o")
        assert [list(line.get_ydata()) for line in solid] == [c.true for c in curves]
        assert [list(line.get_xdata()) for line in solid] == [c.root_kl for c in curves]
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [list(line.get_ydata()) for line in dashed] == [c.proxy for c in curves]


def test_early_stops_are_drawn_where_they_happen(panels):
    stopping = panels[3]
    kept = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines(stopping, "*")]
    assert kept == [(3, 1.5), (6, 2.0)]
    ends = [
        line.get_xdata()[0] for line in stopping.lines if len(line.get_xdata()) == 2
    ]
    assert ends == [9, 12]


def test_tables_by_hand():
    assert early_stopping(HACKED, patience=2) == {
        "true": {"stopped": 9, "kept": 3},
        "other models": {"stopped": 12, "kept": 6},
    }
    # WORST is trained on the other models, so that they say nothing about it.
    assert early_stopping(WORST, patience=2) == {"true": {"stopped": 15, "kept": 15}}
    summary = summarize(CURVES, patience=2)
    rows = {row["optimised"]: row for row in table(summary)}
    assert rows[HACKED.name] == {
        "optimised": HACKED.name,
        "KL at the end": "25.00",
        "proxy at the end": "5.00",
        "true at the end": "−3.00",
        "best true": "1.50 (update 3)",
        "turns down": "update 3",
    }
    assert rows[SOUND.name]["turns down"] == "no"
    assert rows[BEST_OF_N.name]["best true"] == "0.50 (n 4)"
    assert rows[BEST_OF_N.name]["KL at the end"] == "≤ 0.60"  # a bound
    stops = [(row["run"], row["watched"]) for row in stopping_table(summary)]
    # The true reward of the other two never stops rising.
    assert stops == [
        (HACKED.name, "true"),
        (HACKED.name, "other models"),
        (SOUND.name, "other models"),
    ]
    assert stopping_table(summary)[1]["its true reward"] == "0.50"
    assert (
        markdown_table([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"
    )
