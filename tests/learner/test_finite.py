"""`finite.py`: which term went wrong first, and what the error says."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.learner.finite import NonFiniteError, first_nonfinite, pop_nonfinite


def test_the_first_bad_step_of_each_term():
    found = first_nonfinite(
        {
            "fine": jnp.array([0.5, 1.5, 2.5]),
            "nan": jnp.array([0.5, np.nan, 2.5]),
            "inf": jnp.array([0.5, 1.5, -np.inf]),
            "both": jnp.array([np.inf, np.nan, 1.0]),
        }
    )
    assert {name: int(step) for name, step in found.items()} == {
        "first_nonfinite/fine": -1,
        "first_nonfinite/nan": 1,
        "first_nonfinite/inf": 2,
        "first_nonfinite/both": 0,
    }
    assert all(x.dtype == jnp.int32 and x.shape == () for x in found.values())


def test_nothing_found_leaves_the_other_metrics():
    metrics = {"policy/loss": 0.5, "first_nonfinite/loss": -1}
    assert pop_nonfinite(metrics, step=3) == {"policy/loss": 0.5}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a_gradient": 3, "loss": 4}, r"^step 12: a_gradient .*optimizer step 3 of"),
        ({"a_gradient": 3, "loss": 3}, r"^step 12: loss .*optimizer step 3 of"),
        ({"entropy": -1, "loss": 0}, r"^step 12: loss .*optimizer step 0 of"),
    ],
    ids=["the earliest", "a loss before its gradient", "not the finite one"],
)
def test_the_error_names_the_cause(found, message):
    metrics = {f"first_nonfinite/{name}": step for name, step in found.items()}
    with pytest.raises(NonFiniteError, match=message) as caught:
        pop_nonfinite({"policy/loss": 0.5} | metrics, step=12)
    assert "\n" not in str(caught.value)
    assert caught.value.optimizer_step == min(s for s in found.values() if s >= 0)
