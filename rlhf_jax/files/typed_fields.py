"""Fields of an object read from a file, with their type and range checked.

An error is one line, `NAME is VALUE: give …`; callers put the file before it.
"""

from collections.abc import Mapping
from typing import Any

from rlhf_jax.files.printable import printable, shown

Fields = dict[str, Any]
MOST_INTEGER = 2**31 - 1


def _is(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _wrong(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{printable(name, limit=80)} is {shown(value)}: give {wanted}")


def integer(
    fields: Mapping[str, Any],
    name: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = MOST_INTEGER,
) -> int:
    """An integer in a range; `default`, if given, when missing or null."""
    value: Any = fields.get(name)
    value = default if value is None else value
    if not _is(int, value) or not least <= value <= most:
        raise _wrong(name, value, f"an integer from {least} to {most:,}")
    return value


def optional_integer(
    fields: Mapping[str, Any], name: str, *, most: int = MOST_INTEGER
) -> int | None:
    """A positive integer, or None if missing or null."""
    return None if fields.get(name) is None else integer(fields, name, most=most)


def number(
    fields: Mapping[str, Any],
    name: str,
    default: float | None = None,
    *,
    least: float = 1e-30,
    most: float = 1e30,
) -> float:
    """A number in a range; `default`, if given, when missing or null.

    The default range is that of positive numbers whose squares float32 can nearly hold.
    """
    value: Any = fields.get(name)
    value = default if value is None else value
    if not _is(int | float, value) or not least <= value <= most:  # NaN is in no range
        raise _wrong(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def optional_number(
    fields: Mapping[str, Any], name: str, default: float | None = None
) -> float | None:
    """A positive number, `default` if missing, or None if null."""
    value = fields.get(name, default)
    return None if value is None else number({name: value}, name)


def flag(fields: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """True or false; `default` when missing."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A text; `default`, if given, when missing or null."""
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def section(fields: Mapping[str, Any], name: str) -> Fields:
    """An object; empty when missing or null."""
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object or null")
    return value
