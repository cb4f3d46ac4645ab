"""Bounds of rewards, and of the calls of reward functions."""

from rlhf_jax.algo.options import check

LARGEST_REWARD = 1e12
"""Largest absolute score and weight of a reward, and largest weighted sum. Squares can
still be summed in float32 over the gradient of a large model: 1e24 · 1e12 < 3e38."""
LONGEST_CALL = 604_800.0
"""Seconds, the largest time limit of a reward function: a week. The clocks of some
systems end after 24 days."""
LARGEST_MEMORY = 1e6
"""GiB, the largest memory limit of a reward function."""


def check_call_limits(seconds: float, memory: float | None) -> None:
    """Raises ValueError naming the limit of reward functions that cannot work."""
    check(
        0 < seconds <= LONGEST_CALL,
        "reward-time-limit",
        seconds,
        f"must be above 0, at most {LONGEST_CALL:g} (a week)",
    )
    check(
        memory is None or 0 < memory <= LARGEST_MEMORY,
        "reward-memory-limit",
        memory,
        f"must be above 0, at most {LARGEST_MEMORY:g} GiB, or None",
    )
