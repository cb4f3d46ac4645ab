"""Options of exported functions: numbers out of range, and of a wrong shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from algo.function_cases import CASES
from algo.function_inputs import B, T, arrays

import rlhf_jax as rj


def test_bound_of_a_numpy_number_of_samples_is_a_python_number():
    assert type(rj.best_of_n_kl(np.int64(2))) is float
    # log 2 − 1/2
    np.testing.assert_allclose(rj.best_of_n_kl(np.int64(2)), 0.193147, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("transform_logits", "top_p", np.float32(1.5)),
        ("transform_logits", "min_p", np.float32(-0.5)),
        ("preference_loss", "label_smoothing", np.float32(0.5)),
        ("combine_scores, mean-minus-std", "penalty", np.float32(-1)),
        ("combine_scores, mean-minus-std", "penalty", float("nan")),
        ("soft_cap", "cap", np.float32(0)),
        ("soft_cap", "cap", -2.0),
    ],
)
def test_numbers_out_of_range_are_named(name, option, value):
    case = CASES[name]
    with pytest.raises(ValueError, match=rf"{option}={value}: expected"):
        case.call(arrays(), **case.options | {option: value})


@pytest.mark.parametrize(
    "name", ["gae", "gae, associative", "td_errors", "n_step_returns"]
)
def test_a_discount_per_row_or_token_is_refused(name):
    # Broadcasting would take one of `[T]`, in `gae` one of `[B]`, in silence.
    case = CASES[name]
    for size in (B, T):
        with pytest.raises(AssertionError, match="rank"):
            case.call(arrays(), **case.options | {"gamma": jnp.full(size, 0.9)})


@pytest.mark.parametrize("lam", [jnp.full(1, 0.5), jnp.full(T, 0.5)])
def test_lam_is_one_number_or_one_per_row(lam):
    with pytest.raises(AssertionError, match="shape"):
        x = arrays()
        rj.gae(x["rewards"], x["values"], x["mask"], lam=lam)
