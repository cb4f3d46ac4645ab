"""Reads JSON that someone else wrote, under limits.

Stricter than the standard: a key occurs once in an object, numbers are finite and
have few digits, texts can be encoded.
"""

import json
import math
import os
import re
from typing import Any

from rlhf_jax.files.printable import one_line, printable, shown
from rlhf_jax.files.regular_file import CONFIG_BYTES, read_text

MOST_DEPTH = 100
"""Lists and objects inside each other."""
MOST_DIGITS = 40
"""Of an integer; 64 bits have 20."""
MOST_VALUES = 1_000_000
"""Values of all lists and objects together."""
_MOST_NUMBER = 400  # characters of any other number

# A text, or what structures the rest. Possessive, so long texts need no memory.
_PART = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]|,', re.DOTALL)
# Half of a pair that writes a character above U+FFFF, perhaps behind a backslash.
_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


class _Refused(ValueError):
    """Found by a hook, which does not know the place."""


def parse_json(
    text: str,
    where: str,
    *,
    most_values: int = MOST_VALUES,
    finite: bool = True,
    encodable: bool = True,
) -> Any:
    """The value of a JSON text.

    Args:
        text: to parse.
        where: file, or file and line; begins the message of an error.
        most_values: most values of all lists and objects together.
        finite: numbers must be finite; otherwise `NaN` and `Infinity` are numbers,
            which JSON has not, but Python writes.
        encodable: texts must be encodable; otherwise they may have half a character.

    Raises:
        ValueError: one line with the place and the problem.
    """
    try:
        _check_structure(text, most_values)
        value = (_FINITE if finite else _ANY).decode(text)
        if encodable and "\\u" in text and _HALF.search(text):
            check_texts(value)
        return value
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if "\n" in text.strip():
            place = f"line {error.lineno}, {place}"
        problem = f"{one_line(error.msg)}: {place}"
    except _Refused as error:
        problem = str(error)
    except RecursionError:
        problem = "nested too deeply"
    raise ValueError(f"{printable(where)}: not valid JSON ({problem})")


def read_json(
    path: str | os.PathLike[str],
    *,
    most_bytes: int = CONFIG_BYTES,
    most_values: int = MOST_VALUES,
) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: as `read_text` and `parse_json`.
    """
    text = read_text(path, most_bytes=most_bytes)
    return parse_json(text, os.fspath(path), most_values=most_values)


def read_object(
    path: str | os.PathLike[str],
    *,
    most_bytes: int = CONFIG_BYTES,
    most_values: int = MOST_VALUES,
) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: as `read_json`, or if the value is not an object.
    """
    value = read_json(path, most_bytes=most_bytes, most_values=most_values)
    if not isinstance(value, dict):
        raise ValueError(
            f"{printable(os.fspath(path))}: must contain one JSON object, not "
            f"{shown(value)}"
        )
    return value


def _check_structure(text: str, most_values: int) -> None:
    """Depth and number of values, before anything is built."""
    opened = text.count("[") + text.count("{")
    if opened <= MOST_DEPTH and text.count(",") + opened <= most_values:
        return
    depth = values = 0
    for part in _PART.finditer(text):
        first = text[part.start()]
        if first == '"':
            continue
        if first in "]}":
            depth -= 1
            continue
        values += 1
        depth += first != ","
        if depth > MOST_DEPTH:
            raise _Refused(f"nested more than {MOST_DEPTH} levels deep")
        if values > most_values:
            raise _Refused(f"more than {most_values:,} values")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Refused(f"the key {shown(name)} occurs twice in one object")
            seen.add(name)
    return found


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _Refused(f"an integer of {len(text)} digits; at most {MOST_DIGITS}")
    return int(text)


def _number(text: str) -> float:
    if len(text) > _MOST_NUMBER:
        raise _Refused(f"a number of {len(text)} characters; at most {_MOST_NUMBER}")
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:40]} is too large")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"{text} is not a number of JSON")


def check_texts(value: Any) -> None:
    """Raises ValueError if a text cannot be encoded: it has half of a pair."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                half = printable(value[error.start])
                raise _Refused(f"{half} is half a character") from None


_ANY = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_FINITE = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_number,
    parse_constant=_constant,
)
