"""`finite.py`: which term went wrong first, and what the error says."""

import numpy as np
import pytest

from rlhf_jax.learner.finite import NonFiniteError, first_nonfinite, pop_nonfinite


def test_the_first_bad_step_of_each_term():
    found = first_nonfinite(
        {
            "terms/fine": np.array([0.5, 1.5, 2.5]),
            "terms/nan": np.array([0.5, np.nan, 2.5]),
            "terms/inf": np.array([0.5, 1.5, -np.inf]),
            "terms/both": np.array([np.inf, np.nan, 1.0]),
            "policy/ratio_mean": np.inf,
        }
    )
    assert found == {"fine": -1, "nan": 1, "inf": 2, "both": 0}


def test_nothing_found_leaves_the_other_metrics():
    metrics = {"policy/loss": 0.5, "terms/loss": np.array([0.5])}
    assert pop_nonfinite(metrics, step=3) == {"policy/loss": 0.5}


def nan_at(step):
    values = np.zeros(5)
    values[step:] = np.nan
    return values


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a_gradient": 3, "loss": 4}, r"^step 12: a_gradient .*optimizer step 3 of"),
        ({"a_gradient": 3, "loss": 3}, r"^step 12: loss .*optimizer step 3 of"),
        ({"entropy": 5, "loss": 0}, r"^step 12: loss .*optimizer step 0 of"),
    ],
    ids=["the earliest", "a loss before its gradient", "not the finite one"],
)
def test_the_error_names_the_cause(found, message):
    metrics = {f"terms/{name}": nan_at(step) for name, step in found.items()}
    with pytest.raises(NonFiniteError, match=message) as caught:
        pop_nonfinite({"policy/loss": 0.5} | metrics, step=12)
    assert "\n" not in str(caught.value)
    assert caught.value.optimizer_step == min(found.values())
