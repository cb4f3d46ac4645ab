"""Messages between the run and its reward workers: JSON with its length before it.

Never pickle: a reward function can write to the socket of its worker, and unpickling
runs code. Only the standard library: workers use this file too.
"""

import base64
import datetime
import decimal
import json
import struct
import zoneinfo
from collections.abc import Callable, Mapping
from typing import Any

LONGEST_FRAME = 1 << 30
_LENGTH = struct.Struct(">I")
_DEEPEST = 200  # levels of lists and dictionaries in a value of a column


class FrameError(ValueError):
    """What arrived is not a message."""


def to_frame(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message.

    Raises:
        FrameError: if they are too many.
    """
    content = json.dumps(message).encode("ascii")
    if len(content) > LONGEST_FRAME:
        raise FrameError(
            f"{len(content)} bytes for one call of a reward function, of at most "
            f"{LONGEST_FRAME}; name fewer --reward-columns, or use smaller batches"
        )
    return _LENGTH.pack(len(content)) + content


def take_frame(received: bytearray, *, longest: int) -> dict[str, Any] | None:
    """Takes the first message off `received`; None: it is not complete yet.

    Raises:
        FrameError: if it is longer than `longest` bytes, or not a JSON object.
    """
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > longest:
        raise FrameError(f"a message of {length} bytes; at most {longest} are due")
    end = _LENGTH.size + length
    if len(received) < end:
        return None
    content = bytes(received[_LENGTH.size : end])
    del received[:end]
    try:
        message = json.loads(content)
    except (ValueError, RecursionError):
        raise FrameError("a message that is not JSON") from None
    if not isinstance(message, dict):
        raise FrameError("a message that is not a JSON object")
    return message


def pack(value: Any, depth: int = 0) -> Any:
    """A value of a row file, or an array of them, as JSON that `unpack` reverses.

    Every object of the JSON has one key, the type of what it holds.

    Raises:
        ValueError: if it holds a value of another type, or is nested too deeply.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth == _DEEPEST:
        raise ValueError(f"lists and dictionaries nested more than {_DEEPEST} deep")
    if type(value) is list:
        return [pack(item, depth + 1) for item in value]
    if type(value) is dict:
        items = [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in value.items()]
        return {"dict": items}
    if type(value) is tuple:
        return {"tuple": [pack(item, depth + 1) for item in value]}
    if hasattr(value, "tolist"):  # of NumPy
        return pack(value.tolist(), depth + 1)
    for name, (kind, to_json, _) in _OTHER_TYPES.items():
        if type(value) is kind:
            return {name: to_json(value)}
    raise ValueError(f"a value of type {type(value).__name__}")


def unpack(value: Any) -> Any:
    """What was packed."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind == "tuple":
        return tuple(map(unpack, content))
    return _OTHER_TYPES[kind][2](content)


def _from_datetime(value: datetime.datetime) -> list:
    return [value.isoformat(), getattr(value.tzinfo, "key", None), value.fold]


def _to_datetime(content: list) -> datetime.datetime:
    text, zone, fold = content
    found = datetime.datetime.fromisoformat(text)
    if zone is not None:  # the offset alone forgets summer time
        found = found.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    return found.replace(fold=fold)


_OTHER_TYPES: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, lambda x: base64.b64encode(x).decode(), base64.b64decode),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "datetime": (datetime.datetime, _from_datetime, _to_datetime),
    "date": (datetime.date, str, datetime.date.fromisoformat),
    "time": (datetime.time, str, datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda x: [x.days, x.seconds, x.microseconds],
        lambda x: datetime.timedelta(*x),
    ),
}
"""What parquet files hold besides JSON's types: to JSON, and back."""
