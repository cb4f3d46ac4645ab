"""What is read off a curve: turns that are there, none that are noise, early stops."""

import numpy as np
import pytest

from rlhf_jax.demos.overoptimization.curves import (
    Curve,
    best_before,
    stopping_point,
    turning_point,
)


def test_a_turn_by_hand():
    # The last three have mean 0.5. With errors 0.25 that of the difference is
    # 0.25 · √(1 + 1/3) = 0.289: the peak must be above 0.5 + 4 · 0.289 = 1.655.
    rise = [-0.5, 0.25]
    assert turning_point([*rise, 1.7, 1.0, 0.75, 0.5, 0.25], [0.25] * 7) == 2
    assert turning_point([*rise, 1.6, 1.0, 0.75, 0.5, 0.25], [0.25] * 7) is None


def test_a_peak_near_the_end_is_no_turn_yet():
    errors = [0.01] * 6
    assert turning_point([0.0, 1.0, 2.0, 9.0, 0.0, 0.0], errors) is None
    assert turning_point([0.0, 1.0, 9.0, 0.0, 0.0, 0.0], errors) == 2
    assert turning_point([5.0, 0.0, 0.0], [0.01] * 3) is None
    assert turning_point([5.0, 0.0, 0.0, 0.0], [0.01] * 4) == 0


@pytest.mark.parametrize("shape", ["flat", "rising to a plateau"])
def test_noise_is_not_marked(shape):
    rng = np.random.default_rng(0)
    steps = np.arange(20)
    mean = np.zeros(20) if shape == "flat" else 2 * (1 - np.exp(-steps / 3))
    marked = [
        turning_point((mean + 0.1 * rng.normal(size=20)).tolist(), [0.1] * 20)
        for _ in range(2000)
    ]
    assert sum(turn is not None for turn in marked) < 10  # 0.5 %


def test_a_fall_of_eight_errors_is_found_near_its_peak():
    rng = np.random.default_rng(0)
    steps = np.arange(20)
    mean = 2 - 0.008 * (steps - 9) ** 2  # 0.8 below the peak at 19, 0.65 on average
    for _ in range(200):
        turn = turning_point((mean + 0.08 * rng.normal(size=20)).tolist(), [0.08] * 20)
        assert turn is not None and abs(turn - 9) <= 7


def test_errors_belong_to_values():
    with pytest.raises(ValueError, match="2 values but 1 errors"):
        turning_point([0.0, 1.0], [0.1])


def test_stopping_by_hand():
    values = [0.0, 1.0, 0.5, 2.0, 1.5, 1.9, 2.0, 5.0]
    assert stopping_point(values, patience=1) == 2
    assert stopping_point(values, patience=2) == 5  # 1.5 and 1.9 are below 2.0
    assert stopping_point(values, patience=3) == 6  # an equal value is no new best
    assert stopping_point(values, patience=4) == 7
    assert stopping_point([3.0], patience=1) == 0
    assert best_before(values, 5) == 3
    assert best_before(values, 2) == 1


def test_distance_of_a_negative_estimate_is_zero():
    curve = Curve(
        name="",
        method="ppo",
        scored_by="single",
        beta=0.0,
        at=[0, 1],
        kl=[-0.001, 6.25],
        proxy=[0.0, 1.0],
        true=[0.0, 1.0],
        true_error=[0.1, 0.1],
    )
    assert curve.root_kl == [0.0, 2.5]
    assert curve.turn is None
