"""Limits of the numbers in options, checked before any work."""

import dataclasses
import sys
from numbers import Integral
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rlhf_jax.algo.options import check

MOST_COUNT = 2**31 - 1
"""Steps, rows and tokens are counted in int32."""

MOST = {
    # Rows and columns of a batch. Their product is limited to MOST_COUNT.
    "batch_size": 2**20,
    "group_size": 2**20,
    "max_tokens": 2**20,
    "max_prompt_tokens": 2**20,
    "max_new_tokens": 2**20,
    # Keys of an update, one per pass.
    "epochs": 1000,
    # Responses per prompt, and prompts, that are in memory at the same time.
    "samples": 2**14,
    "eval_samples": 2**14,
    "best_of_samples": 2**14,
    "best_of_prompts": 2**14,
    # Sizes of arrays.
    "vocab_size": 2**20,
    "max_positions": 2**20,
    "rank": 2**14,
    # Devices, processes, models and rounds, each of which takes memory or time.
    "data": 2**12,
    "fsdp": 2**12,
    "reward_processes": 2**10,
    "ensemble": 2**6,
    "models": 2**6,
    "resample": 1000,
}
"""Largest value by name of the option; all other counts: MOST_COUNT."""

# Of float32; the smallest is not subnormal.
_LARGEST = (2 - 2.0**-23) * 2.0**127
_SMALLEST = 2.0**-126


def check_numbers(
    options: Any, prefix: str = "", *, most_seed: int = 2**64 - 1
) -> None:
    """Checks the type of every number, and that it is not too large to compute with.

    Narrower limits, such as "above 0", are up to the option's own `validate`.

    Args:
        options: a dataclass; those in its fields are checked too.
        prefix: of its flags, such as `"optimizer."`.
        most_seed: the largest `seed`.

    Raises:
        ValueError: naming the first option that is not a number of its type, not
            finite, or out of range.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = vars(options)[field.name]
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{flag}.")
            continue
        kind = _number_type(hints[field.name])
        values = value if isinstance(value, tuple) else (value,)
        for number in values if kind else ():
            if number is None and type(None) in get_args(hints[field.name]):
                continue
            most = MOST.get(field.name, MOST_COUNT if kind is int else _LARGEST)
            _check_printable(flag, number, most)
            if field.name == "seed":
                _check_seed(number, most_seed)
            elif kind is int:
                _check_count(flag, number, most)
            else:
                _check_float(flag, number, most)


def check_batch(rows: int, tokens: int, *, columns: str) -> None:
    """Raises ValueError if a batch has too many tokens.

    Args:
        rows: the option `batch-size`.
        tokens: per row.
        columns: the options that `tokens` are the sum of.
    """
    why = (
        f"gives batches of {rows * tokens} tokens, must be at most {MOST_COUNT}; lower "
        f"it or {columns}"
    )
    check(rows * tokens <= MOST_COUNT, "batch-size", rows, why)


def _number_type(hint: Any) -> type | None:
    """int or float for `int`, `float`, `int | None`, `tuple[float, ...]`; else None."""
    if isinstance(hint, UnionType) or get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    return hint if hint in (int, float) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_seed(value: Any, most: int) -> None:
    why = f"must be a whole number from 0 to {most}"
    check(_is_whole(value) and 0 <= value <= most, "seed", value, why)


def _check_printable(flag: str, value: Any, most: float) -> None:
    # Python refuses to print integers of more than 4,300 digits, with another error.
    if isinstance(value, int) and value.bit_length() > 256:
        raise ValueError(
            f"{flag}: an integer of {value.bit_length()} bits; must be at most {most}"
        )


def _check_count(flag: str, value: Any, most: float) -> None:
    check(_is_whole(value), flag, value, "must be a whole number")
    check(value <= most, flag, value, f"must be at most {most}")
    check(value >= -MOST_COUNT, flag, value, "must not be negative")


def _check_float(flag: str, value: Any, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    check(is_number, flag, value, "must be a number")
    is_finite = -sys.float_info.max <= value <= sys.float_info.max
    check(is_finite, flag, value, "must be finite")
    why = f"must be at most {most:g}, and not below {-_LARGEST:g}"
    check(-_LARGEST <= value <= most, flag, value, why)
    why = f"is 0 in float32; must be 0, or at least {_SMALLEST:g} in size"
    check(value == 0 or abs(value) >= _SMALLEST, flag, value, why)
