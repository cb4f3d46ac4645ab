"""Checks of the temperature shared by sampling and training."""

from numbers import Real

from rlhf_jax.algo.types import Scalar

# Below it, logits divided by the temperature approach the float32 limit, where
# inf − inf is NaN; below 1e-38 the temperature itself is 0 in float32.
SMALLEST = 1e-30

# Rounding leaves 1e-7 · |z| / T of a log-probability: below this, as much as 1e-4.
SMALLEST_TO_LEARN = 1e-2


def is_greedy(temperature: Scalar) -> bool:
    """Whether the temperature is the number 0; an array never is."""
    return isinstance(temperature, Real) and bool(temperature == 0)


def check_temperature(
    temperature: Scalar, *, greedy: bool = False, smallest: float = SMALLEST
) -> None:
    """Raises ValueError for a temperature that gives no valid distribution.

    Args:
        temperature: a number, Python's or NumPy's. A JAX array is not checked: its
            value may be unknown.
        greedy: allow 0.
        smallest: the smallest allowed nonzero value.

    Raises:
        ValueError: when a number is negative, not finite, or too small to divide by.
    """
    if not isinstance(temperature, Real) or (greedy and temperature == 0):
        return
    if not smallest <= temperature < float("inf"):
        choice = ", or 0 for greedy decoding" if greedy else ""
        raise ValueError(
            f"temperature={temperature}: expected at least {smallest:g}, and finite"
            + choice
        )
