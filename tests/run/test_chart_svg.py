"""A curve is drawn where its numbers are."""

import re

import numpy as np
import pytest

from rlhf_jax.run.chart_svg import draw, line_colors, trailing_mean
from rlhf_jax.run.charts import COLORS, Chart


def curves(svg, color):
    """Points of each path that is stroked in a colour: lists of subpaths."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*?style="([^"]*)"', svg)
    return [
        [
            np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", part), float)
            for part in re.split(r"(?=M )", d)
            if part.strip()
        ]
        for d, style in paths
        if f"stroke: {color}" in style and "fill: none" in style
    ]


def series(values):
    return np.arange(len(values)), np.array(values, float)


def test_points_lie_where_the_numbers_are():
    chart = Chart("Loss", "nats", {"a": "a"})
    svg = draw(chart, {"a": (np.array([0, 1, 4]), np.array([0.0, 3.0, 1.0]))})
    ((points,),) = curves(svg, COLORS[0])
    x, y = points.T
    # Affine in step, and affine downwards in value: 1 and 3 lie 1/3 and 3/3 of the way.
    np.testing.assert_allclose((x - x[0]) / (x[2] - x[0]), [0, 1 / 4, 1], atol=1e-3)
    np.testing.assert_allclose((y[0] - y) / (y[0] - y[1]), [0, 1, 1 / 3], atol=1e-3)
    assert y[1] < y[0]  # up is smaller in SVG


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leaves_a_gap(hole):
    svg = draw(
        Chart("t", "", {"a": "a"}), {"a": series([1.0, 2.0, hole, 3.0, 5.0, 4.0])}
    )
    ((before, after),) = curves(svg, COLORS[0])
    assert (len(before), len(after)) == (2, 3)


def test_nothing_finite_draws_nothing():
    assert draw(Chart("t", "", {"a": "a"}), {"a": series([np.nan, np.inf])}) == ""


def test_one_value_is_visible():
    svg = draw(Chart("t", "", {"a": "a"}), {"a": series([0.5])})
    assert svg.count("<use ") >= 1
    assert COLORS[0] in svg


def test_a_long_noisy_curve_is_drawn_raw_and_smoothed():
    noise = np.random.default_rng(0).normal(size=300)
    svg = draw(Chart("t", "", {"a": "a"}), {"a": series(noise)})
    (raw,), (smooth,) = curves(svg, COLORS[0])
    # 300 points are averaged over 10: the spread shrinks by about sqrt(10) = 3.2.
    assert np.ptp(smooth[:, 1]) < np.ptp(raw[:, 1]) / 2


def test_trailing_mean_by_hand():
    values = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(trailing_mean(values, 2), [1, 1.5, 4, 5])
    np.testing.assert_allclose(trailing_mean(values, 9), [1, 1.5, 3, 3.25])
    np.testing.assert_allclose(trailing_mean(values, 1), values)


@pytest.mark.parametrize("value", [0.02, -0.1, 1e6 / 3])
def test_trailing_mean_of_a_constant_is_that_constant(value):
    # A coefficient that never changes must not be drawn as a staircase of rounding.
    np.testing.assert_array_equal(trailing_mean(np.full(200, value), 6), value)


def test_lines_of_pass_at_k_have_different_colors():
    # pass@1, 2, 4, … 128
    lines = {f"eval/pass_at_{2**i}": f"pass@{2**i}" for i in range(8)}
    assert len(set(line_colors(Chart("pass@k", "", lines)))) == 8


def test_band_covers_one_deviation_on_both_sides():
    chart = Chart("t", "", {"a": "mean"}, band="s")
    data = {"a": series([0.0, 1.0, 0.0]), "s": series([1.0, 2.0, 1.0])}
    svg = draw(chart, data)
    ((line,),) = curves(svg, COLORS[0])
    # Matplotlib defines the area once, relative to a `y` that its use adds.
    area = re.search(r'<path id="(\w+)" d="(M [^"]*z\s*)"', svg)
    assert area is not None
    used = re.search(rf'xlink:href="#{area[1]}" x="0" y="([\d.]+)"', svg)
    assert used is not None
    points = np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", area[2]), float)
    unit = line[0, 1] - line[1, 1]  # the mean rises by 1 between these points
    for (x, middle), deviation in zip(line, (1, 2, 1), strict=True):
        ends = points[np.isclose(points[:, 0], x), 1] + float(used[1])
        wanted = [middle - deviation * unit, middle + deviation * unit]
        np.testing.assert_allclose([ends.min(), ends.max()], wanted, rtol=1e-4)


def test_drawing_twice_gives_the_same_text():
    chart = Chart("t", "", {"a": "a", "b": "b"})
    data = {"a": series([1.0, 2.0]), "b": series([2.0, 1.0])}
    assert draw(chart, data) == draw(chart, data)
