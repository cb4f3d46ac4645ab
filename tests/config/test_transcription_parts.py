"""The pieces of the transcriptions against numbers worked out by hand."""

import math

import numpy as np
import pytest
from config import transcription_parts as parts


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (-1.0, 1.0, -0.36787944117144233, -0.36787944117144233),  # below, not clipped
        (math.log(1.5), 1.0, -1.2, 0.0),
        (math.log(0.5), -2.0, 1.6, 0.0),
        (math.log(1.5), -2.0, 3.0, 3.0),
        (math.log(1.1), -2.0, 2.2, 2.2),
        (math.log(1.1), 2.0, -2.2, -2.2),
    ],
)
def test_every_branch_of_the_clipped_policy_loss(log_ratio, advantage, loss, slope):
    np.testing.assert_allclose(
        parts.policy_token(log_ratio, advantage), (loss, slope), rtol=1e-14
    )


def test_dual_clip_acts_on_bad_tokens_above_its_constant_only():
    dual = {"dual_clip": 3.0}
    assert parts.policy_token(math.log(4.0), -2.0, **dual) == (6.0, 0.0)
    np.testing.assert_allclose(
        parts.policy_token(math.log(2.5), -2.0, **dual), (5.0, 5.0), rtol=1e-14
    )
    np.testing.assert_allclose(
        parts.policy_token(math.log(4.0), 2.0, **dual), (-2.4, 0.0), rtol=1e-14
    )


def test_the_log_ratio_clamp_bounds_the_loss_and_ends_the_gradient():
    clamp = {"log_ratio_clamp": 20.0}
    assert parts.policy_token(25.0, -1.0, **clamp) == (math.exp(20.0), 0.0)
    assert parts.policy_token(-25.0, 1.0, **clamp) == (-math.exp(-20.0), 0.0)
    assert parts.policy_token(25.0, -1.0) == (math.exp(25.0), math.exp(25.0))
    assert parts.policy_token(19.0, -1.0, **clamp) == (math.exp(19.0), math.exp(19.0))


@pytest.mark.parametrize(
    ("new", "loss", "slope"),
    [
        (0.4, 0.36, -1.2),  # inside the range of .5 ± .2, target 1
        (0.9, 0.09, 0.0),  # moved too far towards the target: held at .7
        (0.1, 0.81, -1.8),  # moved away from it
        (2.0, 1.0, 2.0),  # beyond it and further off than .7
    ],
)
def test_every_branch_of_the_clipped_value_loss(new, loss, slope):
    np.testing.assert_allclose(
        parts.value_token(new, 0.5, 1.0, 0.2), (loss, slope), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("kl", "episodes", "expected"),
    [(12, 512, 0.151536), (6, 512, 0.15), (0, 60000, -0.03)],
)
def test_kl_controller(kl, episodes, expected):
    beta = parts.adapted_kl_coef(0.15, kl, target=6, episodes=episodes, horizon=10000)
    assert beta == pytest.approx(expected, rel=1e-12)


def test_whitening():
    """1, 2, 3 and 6: mean 3, squared deviations 14 in all."""
    centred = [-0.9258200987806015, -0.4629100493903007, 0, 1.3887301481709022]
    np.testing.assert_allclose(
        parts.whiten([1, 2, 3, 6], ddof=1), centred, rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(
        parts.whiten([1, 2, 3, 6], ddof=1, center=False),
        [2.0741799012193987, 2.5370899506096993, 3, 4.388730148170902],
        rtol=1e-12,
    )
    np.testing.assert_allclose(  # variance 3.5 in place of 4.6667
        parts.whiten([1, 2, 3, 6], ddof=0), np.multiply(centred, (4 / 3) ** 0.5)
    )


def test_gae_of_one_row():
    """δ = 1 + .2 − .3 and −2 − .2, and half of the second reaches the first."""
    rewards, values = np.array([1.0, -2.0]), np.array([0.3, 0.2])
    np.testing.assert_allclose(parts.gae_row(rewards, values, 0.5), [-0.2, -2.2])


@pytest.mark.parametrize("seed", range(3))
def test_random_batch_has_the_edges(seed):
    batch = parts.random_batch(seed)
    assert {1, 6, 7} <= set(batch.lengths.tolist()) <= set(range(1, 8))
    full = batch.lengths == 7
    assert batch.truncated[full].any() and not batch.truncated[full].all()
    assert not batch.truncated[~full].any()
    kl = batch.old_logprobs - batch.ref_logprobs
    real = np.arange(7) < batch.lengths[:, None]
    assert kl[real].max() > 10 and kl[real].min() < -10
    assert batch.scores.max() > 5 and batch.scores.min() < -10
    arrays = (batch.old_logprobs, batch.ref_logprobs, batch.new_logprobs)
    assert np.isfinite([*arrays, batch.old_values, batch.new_values]).all()
